"""The variants of the CPU kernels: all of them in emulation, the supported ones executed, and the choice between them.

A process chooses its variant once, so each executed variant needs its own process.
"""

import os
import subprocess
import sys
from pathlib import Path

import emulation
import emulation_jobs
import numpy as np
import op_cases
import pytest
import torch
import yardstick

from nemo_ext import _module, reference

TESTS = Path(__file__).resolve().parents[1]
SUPPORTED = [name for name, supported in _module.cpu_capabilities().items() if supported]


def leg_of(variant, leg):
    """Return the mark of a test's row in the final table. AMX has its own row."""
    return pytest.mark.leg("amx" if variant.startswith("amx") else leg)


def of_variants(*names, leg):
    return pytest.mark.parametrize("variant", [pytest.param(name, marks=leg_of(name, leg)) for name in names])


def run(arguments, capability):
    # Hide the GPUs, because the CUDA kernels have no variants.
    environment = {**os.environ, "NEMO_EXT_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


# --- Emulated


def emulated(variant, inputs, **settings):
    """Return a dict of the results of one call in emulation."""
    job = emulation.cpu_job(variant, **inputs, **settings)
    emulation_jobs.run(emulation.module(), job)
    names = ("values", "activation", "scale_gradient")
    return {name: emulation.result(job, name) for name in names if name in job}


# The dtypes for which a variant has its own main loop. In the other dtypes it has the main loop of avx512.
OWN_DTYPES = {
    "avx2": op_cases.DTYPES,
    "avx512": op_cases.DTYPES,
    "avx512_bf16": (torch.bfloat16,),
    "amx": (torch.bfloat16,),
    "amx_fp16": (torch.float16,),
}
every_own_case = pytest.mark.parametrize(
    ("variant", "case"),
    [
        # As in `op_cases.each`, every seventh case is among the fast tests.
        pytest.param(
            variant,
            case,
            marks=[leg_of(variant, "emulated"), *([pytest.mark.slow] if place % 7 else [])],
            id=f"{variant}-{case}",
        )
        for variant, dtypes in OWN_DTYPES.items()
        for place, case in enumerate(op_cases.CASES)
        if case.dtype in dtypes and (case.tokens or not case.batch)
    ],
)


@every_own_case
def test_emulated_variant_is_as_exact_as_a_sum_in_float32(variant, case):
    inputs, mask = op_cases.projection_inputs(case), op_cases.token_mask(case)
    got = emulated(variant, inputs, token_mask=mask)
    exact_values, exact_activation = reference.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features)
    )
    yardstick.assert_as_exact(got["values"], yardstick.values(**inputs), exact_values)
    inputs.pop("scale")
    yardstick.assert_as_exact(got["activation"], yardstick.activation(**inputs, mask=mask), exact_activation)


@every_own_case
def test_emulated_variant_computes_the_gradient_of_the_scale(variant, case):
    inputs, gradient = op_cases.projection_inputs(case), op_cases.output_gradient(case)
    inputs.pop("scale")
    got = emulated(variant, inputs, gradient=gradient)["scale_gradient"]
    exact = reference.value_projection_scale_gradient(gradient, **inputs)
    sequential = yardstick.scale_gradient(gradient, **inputs)
    yardstick.assert_as_exact(got, sequential, exact, size=yardstick.root_mean_square)


@of_variants("avx512", "avx512_bf16", "amx", "amx_fp16", leg="emulated")
def test_float32_has_the_same_bits_in_every_variant(variant):
    case = op_cases.Case(2, 85, 300, 50, torch.float32, "float32", "per_prompt", False, "contiguous")
    inputs = op_cases.projection_inputs(case)
    ours, others = emulated(variant, inputs), emulated("avx2", inputs)
    assert all(torch.equal(ours[name], others[name]) for name in ("values", "activation"))


@of_variants(*OWN_DTYPES, leg="emulated")
def test_values_of_a_token_do_not_depend_on_the_number_of_tokens(variant):
    """If tiles do not divide a token block, some tokens are computed twice, or next to rows of zeros."""
    hidden, weight = torch.randn(2, 100, 70), torch.randn(40, 70)
    for dtype in OWN_DTYPES[variant]:
        inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
        of_all = emulated(variant, inputs)["values"]
        for tokens in (1, 15, 16, 17, 33, 77, 78, 93):
            fewer = emulated(variant, inputs | {"hidden": inputs["hidden"][:, :tokens]})["values"]
            assert torch.equal(fewer, of_all[:, :tokens]), f"{tokens} tokens"


@of_variants("amx", "amx_fp16", leg="emulated")
@pytest.mark.parametrize("where", [(0, 0), (76, 15), (15, 31)], ids=str)
def test_an_infinity_affects_only_its_own_token_on_tiles(where, variant):
    dtype = torch.bfloat16 if variant == "amx" else torch.float16
    hidden, weight = torch.randn(2, 77, 32).to(dtype), torch.randn(33, 32).to(dtype)
    hidden[1, where[0], where[1]] = torch.inf
    values = emulated(variant, {"hidden": hidden, "weight": weight})["values"]
    finite = torch.ones_like(values, dtype=torch.bool)
    finite[1, where[0]] = False
    assert torch.equal(values.isfinite(), finite)


@pytest.mark.slow
@of_variants("amx", leg="emulated")
def test_a_kernel_that_does_not_configure_its_tiles_is_an_error(variant):
    """The emulation refuses a tile that is not configured, as a CPU does."""
    fault = emulation.Fault("csrc/cpu/project.h", "    configure_full_tiles();\n", "")
    job = emulation.cpu_job(variant, torch.randn(1, 16, 32).bfloat16(), torch.randn(32, 32).bfloat16())
    with pytest.raises(RuntimeError, match="TILEZERO: tile 0 is not configured"):
        emulation_jobs.run(emulation.module(fault), job)


PLANTED = {  # name: (what shows it, in_features, file, snippet, replacement)
    "the second 16 neurons are read from the first 16": (
        "numbers",
        64,
        "csrc/cpu/main_loop_tiles.h",
        "load_tile<7>(panel + k * kWidth + kLanes, kRowBytes)",
        "load_tile<7>(panel + k * kWidth, kRowBytes)",
    ),
    "the last tile begins too late and reads rows beyond the tokens": (
        "address",
        64,
        "csrc/cpu/main_loop_tiles.h",
        "next + kTileRows <= rows ? next : rows - kTileRows",
        "next",
    ),
    "rows are not filled up with zeros": (
        "numbers",
        40,
        "csrc/cpu/words.h",
        "__builtin_memset(halves + 2 * count, 0, 4 * size - 2 * count);",
        "__builtin_memset(halves + 2 * count, 63, 4 * size - 2 * count);",
    ),
}


@pytest.mark.slow
@pytest.mark.leg("amx")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name):
    """The fault changes the results, or AddressSanitizer reports it, as the table says."""
    shown_by, in_features, *change = PLANTED[name]
    fault = emulation.Fault(*change)
    inputs = {"hidden": torch.randn(1, 29, in_features).bfloat16(), "weight": torch.randn(40, in_features).bfloat16()}
    job = emulation.cpu_job("amx", **inputs)
    if shown_by == "address":
        assert "heap-buffer-overflow" in emulation.sanitizer_report(shown_by, [job], fault)
    else:
        emulation_jobs.run(emulation.module(fault), job)
        assert not torch.equal(emulation.result(job, "values"), emulated("amx", inputs)["values"])


@pytest.mark.leg("emulated")
@pytest.mark.slow
def test_address_sanitizer_finds_nothing_in_the_variants():
    """The kernels may read only elements of the operands, and write only elements of the results."""
    jobs = [
        emulation.cpu_job(variant, **op_cases.projection_inputs(case), token_mask=op_cases.token_mask(case))
        for variant, dtypes in OWN_DTYPES.items()
        for case in op_cases.CASES
        if case.dtype in dtypes and case.in_features < 768 and case.tokens
    ]
    assert emulation.sanitizer_report("address", jobs) == ""


# --- Executed

EXECUTED = """
import sys, numpy, torch, op_cases
from nemo_ext import ops
case = op_cases.Case(3, 85, 300, 50, getattr(torch, sys.argv[1]), "float32", "per_prompt", True, "contiguous")
inputs, mask = op_cases.projection_inputs(case), op_cases.token_mask(case)
values, activation = ops.value_projection_stats(**inputs, token_mask=mask, **op_cases.running_buffers(50))
scale = inputs.pop("scale")
gradient = torch.ops.nemo_ext.value_projection_scale_gradient(op_cases.output_gradient(case), **inputs)
numpy.savez(sys.argv[2], values=values.float(), activation=activation, scale_gradient=gradient)
"""


@pytest.mark.slow
@of_variants("avx2", "avx512", "avx512_bf16", "amx", leg="cpu")
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_an_executed_variant_returns_the_bits_of_the_emulated_one(dtype, variant, tmp_path):
    if variant not in SUPPORTED:
        pytest.skip(f"this CPU does not support {variant}, which is tested in emulation only")
    if variant == "avx512_bf16" and dtype == torch.bfloat16:
        pytest.skip("CPU vendors round a dot product of bfloat16 pairs differently")
    program = f"import sys; sys.path.insert(0, {str(TESTS / 'helpers')!r})\n{EXECUTED}"
    result = run(["-c", program, str(dtype)[6:], str(tmp_path / "results.npz")], variant)
    assert result.returncode == 0, result.stderr

    case = op_cases.Case(3, 85, 300, 50, dtype, "float32", "per_prompt", True, "contiguous")
    inputs, gradient = op_cases.projection_inputs(case), op_cases.output_gradient(case)
    # The capabilities do not tell whether the AMX tiles support float16, so either result is accepted.
    possible = [variant, "amx_fp16"] if variant == "amx" and dtype == torch.float16 else [variant]
    same = []
    with np.load(tmp_path / "results.npz") as executed:
        for name in possible:
            expected = emulated(name, inputs, token_mask=op_cases.token_mask(case))
            expected |= emulated(name, {**inputs, "scale": None}, gradient=gradient)
            same.append(all(np.array_equal(executed[key], expected[key].float().numpy()) for key in expected))
    assert any(same)


@pytest.mark.slow
@of_variants(*(name for name in SUPPORTED if name != _module.cpu_choice()[0]), leg="cpu")
def test_an_executed_variant_passes_the_numerical_tests(variant):
    files = ["test_ops_reference.py", "test_ops_determinism.py", "test_ops_statistics.py"]
    result = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / "ops" / file) for file in files)], variant
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --- The choice


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("variant", SUPPORTED)
def test_environment_variable_chooses_the_variant(variant):
    result = run(["-c", "from nemo_ext import _module; print(*_module.cpu_choice())"], variant)
    assert result.stdout.strip() == f"{variant} NEMO_EXT_CPU_CAPABILITY selects it"


@pytest.mark.leg("cpu")
def test_an_unknown_variant_is_an_error_that_lists_the_supported_ones():
    program = "import torch; from nemo_ext import ops; ops.value_projection(torch.ones(1, 1, 1), torch.ones(1, 1))"
    result = run(["-c", program], "sse9")
    assert result.returncode != 0
    assert f"must be one that this CPU supports ({', '.join(SUPPORTED)}), got sse9" in result.stderr


UP_TO_BF16 = ["default", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.leg("cpu")
@pytest.mark.parametrize(
    ("supported", "vendor", "family", "expected", "because"),
    [
        (["default"], "", 0, "default", "PyTorch computes the products"),
        (UP_TO_BF16[:2], "AuthenticAMD", 0x19, "avx2", "widest vectors"),
        (UP_TO_BF16[:3], "GenuineIntel", 6, "avx512", "widest vectors"),
        (UP_TO_BF16, "AuthenticAMD", 0x19, "avx512", "not known to be faster"),
        (UP_TO_BF16, "AuthenticAMD", 0x1A, "avx512_bf16", "twice as fast"),
        (UP_TO_BF16, "GenuineIntel", 6, "avx512", "not known to be faster"),
        ([*UP_TO_BF16, "amx"], "GenuineIntel", 6, "amx", "AMX tiles"),
    ],
    ids=["other", "Zen 3", "Skylake", "Zen 4", "Zen 5", "Cooper Lake", "Sapphire Rapids"],
)
def test_the_fastest_variant_for_bfloat16_is_chosen_with_a_reason(supported, vendor, family, expected, because):
    name, reason = _module.best_cpu_choice(set(supported), vendor, family)
    assert name == expected
    assert because in reason


@pytest.mark.leg("cpu")
def test_every_process_of_a_machine_makes_the_same_choice():
    program = "from nemo_ext import _module; print(*_module.cpu_choice())"
    assert len({run(["-c", program], "").stdout for _ in range(3)}) == 1
