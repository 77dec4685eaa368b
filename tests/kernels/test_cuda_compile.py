"""Static properties of the compiled CUDA kernels, read from the machine code of the installed extension."""

import re
import sys
import tempfile
from pathlib import Path

import emulation
import emulation_jobs
import pytest
import torch

from nemo_ext import _module

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernel_limits  # noqa: E402

pytestmark = pytest.mark.leg("compiled")

SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TILES = [
    kernel_limits.Tile(element, shape) for element in kernel_limits.ELEMENTS.values() for shape in kernel_limits.SHAPES
]


@pytest.fixture(scope="module")
def kernels():
    """All compiled kernels, for the shipped architectures unless the build was configured for others."""
    if not _module.build_facts()["cuda_architectures"]:
        pytest.skip(f"this build has no CUDA kernels: {_module.build_facts()['cuda']}")
    return kernel_limits.compiled()


@pytest.fixture
def _documented_compiler():
    """Skip what another version of nvcc may compile differently."""
    if kernel_limits.nvcc_version() not in kernel_limits.DOCUMENT.read_text():
        pytest.skip(f"docs/kernels.md has figures of another nvcc; this build was {kernel_limits.nvcc_version()}")


@pytest.mark.slow
def test_every_architecture_has_every_kernel(kernels):
    architectures = [name for name in _module.build_facts()["cuda_architectures"] if name.startswith("sm_")]
    assert {kernel.architecture for kernel in kernels} == set(architectures)
    for architecture in architectures:
        tiles = [kernel.tile for kernel in kernels if kernel.architecture == architecture]
        assert tiles.count(None) == 1  # the merge
        assert sorted(map(str, filter(None, tiles))) == sorted(map(str, TILES))


@pytest.mark.slow
def test_nothing_is_spilled(kernels):
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack or kernel.local]
    assert not spilling


@pytest.mark.slow
def test_registers_leave_room_for_the_blocks_that_are_planned_for(kernels):
    over = [kernel for kernel in kernels if kernel.tile and kernel.registers > kernel.tile.register_budget]
    assert not over


@pytest.mark.slow
@pytest.mark.usefixtures("_documented_compiler")
def test_the_main_loop_has_every_product_of_its_tile_and_loads_each_fragment_once(kernels):
    """Another compiler may unroll the loop differently."""
    for kernel in kernels:
        if kernel.tile is None or kernel.tile.shape == "loaded":
            continue
        unrolled = 1 if kernel.tile.element == "float32" else 2  # passes over 32 bytes of in_features
        products = 3 if kernel.tile.element == "float32" else 1
        mma_rows, mma_columns = kernel.tile.tile_tokens // 16, kernel.tile.warp_neurons // 8
        assert kernel.loop["HMMA"] == unrolled * products * mma_rows * mma_columns
        assert kernel.loop["LDSM"] == unrolled * (mma_rows + mma_columns // 2)


@pytest.mark.slow
def test_four_adjacent_values_are_stored_by_one_instruction(kernels):
    """A lane holds them for an eighth of the tokens in each group of 16 neurons."""
    for kernel in kernels:
        if kernel.tile:
            stores = "STG.E.128" if kernel.tile.element == "float32" else "STG.E.64"
            assert kernel.stores[stores] >= kernel.tile.tile_tokens // 8 * kernel.tile.warp_neurons // 16


@pytest.mark.parametrize("shape", ["wide", "medium"])
@pytest.mark.parametrize("gpu", [gpu for gpu in kernel_limits.GPUS if "datasheet" not in gpu.name], ids=str)
@pytest.mark.parametrize("element", ["bfloat16", "float16", "float32"])
def test_the_tensor_cores_are_the_bound_of_large_tiles(element, gpu, shape):
    tensor, shared = kernel_limits.cycles(kernel_limits.Tile(element, shape), gpu)
    assert tensor > shared


@pytest.mark.leg("emulated")
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_tiles_are_those_of_the_kernels(tile):
    facts = emulation.module().tile(tile.element, tile.shape)
    assert facts == {
        "threads": 32 * tile.warps,
        "tokens": tile.tokens,
        "neurons": tile.neurons,
        "blocks": tile.blocks,
        "shared_bytes": tile.shared_bytes,
        "clocks": documented_clocks()["float32" if tile.element == "float32" else "16-bit"].get(
            # Strided and loaded tiles are never compared with others, and have narrow's numbers.
            tile.shape if tile.shape in ("wide", "medium", "small") else "narrow"
        ),
    }


def documented_clocks():
    """Return the table of clocks in docs/kernels.md: "16-bit" or "float32" -> shape -> (step, wait, epilogue)."""
    table = re.search(r"<!-- clocks -->\n(.*?)\n<!-- end -->", kernel_limits.DOCUMENT.read_text(), re.S)
    clocks = {"16-bit": {}, "float32": {}}
    for row in table[1].splitlines()[2:]:
        shape, *cells = (cell.strip().replace(",", "") for cell in row.split("|")[1:8])
        clocks["16-bit"][shape], clocks["float32"][shape] = tuple(map(int, cells[:3])), tuple(map(int, cells[3:]))
    return clocks


# Multiprocessors, and the shared memory of one: CUDA C++ Programming Guide, "Compute Capabilities", and data sheets.
PLANNED_GPUS = {"A100": (108, 164), "H100": (132, 228), "RTX 4090": (128, 100), "B200": (148, 228)}


def documented_plans():
    """Return the table of plans in docs/kernels.md: (element, B, N, name of a GPU, what the cell says)."""
    table = re.search(r"<!-- plans -->\n(.*?)\n<!-- end -->", kernel_limits.DOCUMENT.read_text(), re.S)
    header, _, *rows = table[1].splitlines()
    names = [cell.strip() for cell in header.split("|")[4:8]]
    for row in rows:
        element, batch, neurons, *cells = (cell.strip() for cell in row.split("|")[1:8])
        for name, cell in zip(names, cells, strict=True):
            yield element, int(batch), int(neurons.replace(",", "")), name, cell


@pytest.mark.leg("emulated")
@pytest.mark.parametrize(("element", "batch", "neurons", "name", "expected"), documented_plans())
def test_the_plan_is_the_documented_one(element, batch, neurons, name, expected):
    multiprocessors, kibibytes = PLANNED_GPUS[name]
    element, _, values_only = element.partition(", ")
    plan = emulation.module().plan(
        element=element, batch=batch, tokens=77, in_features=768, out_features=neurons, statistics=not values_only,
        multiprocessors=multiprocessors, shared_bytes=kibibytes * 1024,
    )  # fmt: skip
    warps = min(plan["resident"], -(-plan["blocks"] // multiprocessors)) * plan["warps"]
    assert f"{plan['shape']}, {plan['blocks']} blocks, {warps} warps" == expected


def conflicts(module, tile):
    """Count the bank conflicts of a call whose sizes no tile divides."""
    hidden = torch.randn(5, 77, 80).to(getattr(torch, tile.element))
    weight = torch.randn(200, 80).to(hidden.dtype)
    before = module.bank_conflicts()
    emulation_jobs.run(module, emulation.projection_job(hidden, weight, shape=tile.shape))
    return module.bank_conflicts() - before


@pytest.mark.leg("emulated")
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.shape != "loaded"], ids=str)
def test_no_ldmatrix_has_a_bank_conflict(tile):
    assert conflicts(emulation.module(), tile) == 0


@pytest.mark.leg("emulated")
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_without_the_swizzle_ldmatrix_has_bank_conflicts(which):
    shift = {"hidden": 1, "weight": 2}[which]
    fault = emulation.Fault("csrc/cuda/loader.cuh", f"(chunk ^ (row >> {shift} & 3))", "chunk")
    assert conflicts(emulation.module(fault), kernel_limits.Tile("float16", "wide")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("element", ["bfloat16", "float32"])
def test_cuxray_finds_no_spill_and_no_bank_conflict(kernels, architecture, element):
    """cuxray judges only accesses whose addresses it can follow; the emulation counts all that it executes."""
    (kernel,) = [
        kernel
        for kernel in kernels
        if kernel.architecture == architecture and kernel.tile == kernel_limits.Tile(element, "wide")
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = kernel_limits.bank_conflicts(kernel_limits.machine_code(Path(folder))[architecture], kernel)
    assert found == {"ways": 1, "conflicted": 0, "spills": 0}


@pytest.mark.slow
def test_the_epilogue_of_a_token_tile_takes_less_than_a_thousand_instructions():
    try:
        plain, masked = (kernel_limits.epilogue_instructions(masked) for masked in (False, True))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert plain < 1000
    assert masked < 1000
    document = kernel_limits.DOCUMENT.read_text()
    if kernel_limits.nvcc_version() in document:
        assert f"{plain} instructions for a warp and a token tile ({masked} with a mask" in document


@pytest.mark.slow
@pytest.mark.usefixtures("_documented_compiler")
def test_the_tables_of_the_document_are_those_of_this_build(kernels):
    if {kernel.architecture for kernel in kernels} != set(SHIPPED):
        pytest.skip("this build is for other architectures than the ones of docs/kernels.md")
    document = kernel_limits.DOCUMENT.read_text()
    assert kernel_limits.measurements_table(kernels) in document
    assert kernel_limits.bounds_table() in document
    assert kernel_limits.traffic_table() in document
