"""Measures the compiled CUDA kernels statically, without a GPU, and computes the bounds of their speed.

Run `python benchmarks/kernel_limits.py [--write]`. It reads the machine code of the installed extension: registers and
local memory with cuobjdump, the main loop with nvdisasm. The bounds follow from the tile sizes of csrc/cuda/plan.h, as
docs/kernels.md derives them. `--write` updates the tables there. Tests also call `bank_conflicts`, which finds bank
conflicts in shared memory with cuxray.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
ELEMENTS = {"f": "float32", "BFloat16": "bfloat16", "Float16": "float16"}
SIXTEEN_BITS = {"bfloat16", "float16"}
SHAPES = ("wide", "medium", "narrow", "strided", "loaded", "small")
REGISTERS = 65536  # per multiprocessor, on every architecture below
BATCH, TOKENS = 64, 77  # the call in the traffic table
TILE_TOKENS = 80  # of every tile but small
MERGE_REGISTER_BUDGET = REGISTERS // (4 * 256)  # csrc/cuda/merge.cuh: four blocks of 256 threads


@dataclass(frozen=True)
class Tile:
    """The sizes of `BlockTile` in csrc/cuda/plan.h for one element and shape."""

    element: str
    shape: str

    @property
    def element_size(self) -> int:
        return 4 if self.element == "float32" else 2

    @property
    def warp_rows(self) -> int:
        return {"wide": 4, "medium": 2}.get(self.shape, 1)

    @property
    def warp_columns(self) -> int:
        return 2 if self.warp_rows > 1 else 4

    @property
    def warp_neurons(self) -> int:
        return 128 // self.element_size if self.warp_rows > 1 else 16

    @property
    def blocks(self) -> int:
        return {"wide": 1, "medium": 2, "small": 4}.get(self.shape, 3)

    @property
    def warps(self) -> int:
        return self.warp_rows * self.warp_columns

    @property
    def tokens(self) -> int:
        return self.tile_tokens * self.warp_rows

    @property
    def tile_tokens(self) -> int:
        return 16 if self.shape == "small" else TILE_TOKENS

    @property
    def neurons(self) -> int:
        return self.warp_columns * self.warp_neurons

    @property
    def register_budget(self) -> int:
        """Registers per thread with which `blocks` blocks fit on one multiprocessor; an instruction can name 255."""
        return min(255, REGISTERS // (32 * self.warps * self.blocks) // 8 * 8)

    @property
    def shared_bytes(self) -> int:
        stages = {"wide": 3, "loaded": 0}.get(self.shape, 4)
        return (
            stages * (self.tokens + self.neurons) * (128 if self.shape == "small" else 64)
            + 3 * self.warp_rows * self.neurons * 4
        )

    # The next three properties are for 32 bytes of in_features, the depth of one mma.
    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.neurons * 32 // self.element_size

    @property
    def copied_bytes(self) -> int:
        return (self.tokens + self.neurons) * 32

    @property
    def read_bytes(self) -> int:
        return self.warps * (self.tile_tokens + self.warp_neurons) * 32


@dataclass(frozen=True)
class Gpu:
    """Rates per clock and multiprocessor. docs/kernels.md names the sources."""

    name: str
    architecture: str
    flops: dict[int, float]  # dense rate of the tensor cores: bytes of an element -> FLOP; 4 bytes are tf32
    shared_bytes: float = 128


GPUS = (
    Gpu("A100", "sm_80", {2: 2048, 4: 1024}),
    Gpu("H100, datasheet", "sm_90", {2: 4096, 4: 2048}),
    Gpu("H100, mma.sync", "sm_90", {2: 4096 * 0.629, 4: 2048 * 0.629}),
)


class Figures(NamedTuple):
    """The row of a kernel in the table of docs/kernels.md."""

    registers: int
    register_budget: int
    stack: int
    spills: int
    hmma: int
    ldsm: int
    ldgsts: int
    loop_instructions: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the resources that ptxas has allotted, and counts of instructions."""

    architecture: str
    name: str
    registers: int
    stack: int
    local: int
    spills: int
    loop: Counter[str]  # the main loop: the shortest loop with the most HMMA
    stores: Counter[str]  # to global memory, by width

    @property
    def tile(self) -> Tile | None:
        match = re.search(r"TileI(?:f|NS0_\d+(\w+?)E)LNS0_5ShapeE(\d)", self.name)
        return Tile(ELEMENTS[match[1] or "f"], SHAPES[int(match[2])]) if match else None

    @property
    def figures(self) -> Figures:
        counts = (
            (self.loop["HMMA"], self.loop["LDSM"], self.loop["LDGSTS"], self.loop.total()) if self.tile else [0] * 4
        )
        budget = self.tile.register_budget if self.tile else MERGE_REGISTER_BUDGET
        return Figures(self.registers, budget, self.stack, self.spills, *counts)


@cache
def tool(name: str) -> str:
    """Find a CUDA tool on the PATH or in its PyPI package."""
    packages = find_spec("nvidia")
    folders = [
        folder
        for root in (packages.submodule_search_locations or [] if packages else [])
        for folder in sorted(Path(root).glob("cu*/bin"))
    ]
    found = shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{name} was not found: pip install nvidia-cuda-{name}")
    return found


def run(*command: str | Path, **environment: str) -> str:
    """Run a command, with additions to the environment, and return its standard output."""
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def machine_code(folder: Path) -> dict[str, Path]:
    """Extract the machine code of the installed extension into `folder`: architecture -> file."""
    extension = find_spec("nemo_ext._C")
    if extension is None or extension.origin is None:
        raise FileNotFoundError("nemo_ext is not installed: pip install -e . in its source tree")
    subprocess.run([tool("cuobjdump"), "-xelf", "all", extension.origin], cwd=folder, capture_output=True, check=False)
    found = {re.search(r"sm_\w+", file.name)[0]: file for file in sorted(folder.glob("*.cubin"))}  # type: ignore[index]
    if not found:
        raise FileNotFoundError(
            "this build of nemo_ext has no CUDA kernels: install a CUDA toolkit and build again with NEMO_EXT_CUDA=1"
        )
    return dict(sorted(found.items(), key=lambda item: int(item[0][3:].rstrip("af"))))


def main_loop(instructions: list[tuple[int, str]], labels: dict[str, int]) -> Counter[str]:
    """Count the opcodes of the shortest loop with the most HMMA."""
    best: tuple[int, int] = (0, 0)
    loop: Counter[str] = Counter()
    for address, text in instructions:
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target is None or labels.get(target[1], address + 1) > address:
            continue
        inside = [opcode(other) for at, other in instructions if labels[target[1]] <= at <= address]
        candidate = (inside.count("HMMA"), -len(inside))
        if candidate > best:
            best, loop = candidate, Counter(inside)
    return loop


def opcode(text: str, modifiers: bool = False) -> str:
    """Return the opcode of an instruction, without its predicate, and without its modifiers unless asked for."""
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    return name if modifiers else name.split(".")[0]


def kernels_of(architecture: str, cubin: Path) -> list[Kernel]:
    """Return the kernels in a file of machine code."""
    resources = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)",
        run(tool("cuobjdump"), "--dump-resource-usage", cubin),
    )
    listing = run(tool("nvdisasm"), "-c", cubin)
    bodies = {
        match[1]: match[2] for match in re.finditer(r"^\.text\.(\w+):\n(.*?)(?=^\s*\.section|\Z)", listing, re.S | re.M)
    }
    kernels = []
    for name, registers, stack, local in resources:
        instructions, labels, address = [], {}, 0
        for line in bodies[name].splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = address
            elif instruction := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line):
                address = int(instruction[1], 16)
                instructions.append((address, instruction[2]))
                address += 16
        spills = sum(opcode(text) in ("STL", "LDL") for _, text in instructions)
        loop = main_loop(instructions, labels)
        stores = Counter(opcode(text, modifiers=True) for _, text in instructions if opcode(text) == "STG")
        kernels.append(Kernel(architecture, name, int(registers), int(stack), int(local), spills, loop, stores))
    return kernels


def bank_conflicts(cubin: Path, kernel: Kernel) -> dict[str, int]:
    """Find the worst bank conflict, and how many accesses have one, among those whose addresses cuxray can follow."""
    tile = kernel.tile
    assert tile is not None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run(
            Path(sys.executable).with_name("cuxray"), "report", cubin, "--kernel", kernel.name, "--fast", "--json",
            "--threads", str(32 * tile.warps), "--smem-dynamic", str(tile.shared_bytes), "-o", report,
            CUXRAY_NO_FETCH="1", PATH=f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}",
        )  # fmt: skip
        (found,) = json.loads(report.read_text())["units"][0]["kernels"]
    access = found["access"]
    return {
        "ways": access["worst_bank_conflict_ways"],
        "conflicted": access["conflicted_shared_accesses"],
        "spills": found["spills"]["store_instructions"] + found["spills"]["load_instructions"],
    }


def compiled() -> list[Kernel]:
    """Return all kernels of the installed extension."""
    with tempfile.TemporaryDirectory() as folder:
        found = machine_code(Path(folder))
        return [kernel for architecture, cubin in found.items() for kernel in kernels_of(architecture, cubin)]


def epilogue_instructions(masked: bool = False) -> int:
    """Count the instructions of one warp for a token tile: wide, bfloat16, sm_80, as benchmarks/epilogue.cu says."""
    source = Path(__file__).with_name("epilogue.cu")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "epilogue.cubin")
        options = ["-std=c++20", "-O3", "-arch=sm_80", "-cubin", f"-I{source.parent.parent}", *["-DMASK"] * masked]
        run(tool("nvcc"), *options, source, "-o", cubin)
        listing = run(tool("nvdisasm"), "-c", cubin)
    body = re.search(r"^\.text\.\w*epilogue\w*:\n(.*?)(?=^\s*\.section|\Z)", listing, re.S | re.M)
    assert body is not None
    names = [opcode(text) for text in re.findall(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;", body[1])]
    accumulators = Tile("bfloat16", "wide").warp_neurons * TILE_TOKENS // 32
    return sum(name != "NOP" for name in names) - accumulators


def cycles(tile: Tile, gpu: Gpu) -> tuple[float, float]:
    """Return the clocks of the tensor cores and of shared memory for 32 bytes of in_features of one block."""
    products = 3 if tile.element == "float32" else 1
    tensor = products * tile.flops / gpu.flops[tile.element_size]
    return tensor, (tile.copied_bytes + tile.read_bytes) / gpu.shared_bytes


def bounds_table() -> str:
    """Return a row per tile, with the clocks on each GPU separated by slashes."""
    names = " / ".join(gpu.name for gpu in GPUS)
    lines = [
        f"| tile | FLOP | copied, B | read, B | shared memory, clocks | tensor cores, clocks: {names} | bound by | "
        "L2, B/clock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for element in ("bfloat16", "float32"):
        for shape in ("wide", "medium", "narrow", "small"):
            tile = Tile(element, shape)
            clocks = [cycles(tile, gpu) for gpu in GPUS]
            bounds = ["tensor" if tensor >= shared else "shared" for tensor, shared in clocks]
            precision = "float32" if element == "float32" else "16-bit"
            l2_rates = [f"{tile.copied_bytes / max(both):.0f}" for both in clocks]
            lines.append(
                f"| {precision} {shape}, {tile.tokens} × {tile.neurons} | {tile.flops:,} | "
                f"{tile.copied_bytes:,} | {tile.read_bytes:,} | {clocks[0][1]:.0f} | "
                f"{' / '.join(f'{tensor:.0f}' for tensor, _ in clocks)} | "
                f"{bounds[0] if len(set(bounds)) == 1 else ' / '.join(bounds)} | {' / '.join(l2_rates)} |"
            )
    return "\n".join(lines)


def traffic_table() -> str:
    """Return the arithmetic of whole calls and the least traffic of device memory."""
    lines = [
        "| text width K | neurons N | GFLOP | with values, MB | FLOP/B | statistics only, MB | FLOP/B |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = BATCH * TOKENS
    for in_features in (768, 1024, 2048):
        for out_features in (320, 640, 1280, 5760):
            flops = 2 * rows * in_features * out_features
            read = 2 * (rows + out_features) * in_features + 4 * BATCH * out_features
            written = 2 * rows * out_features
            lines.append(
                f"| {in_features} | {out_features:,} | {flops / 1e9:.1f} | {(read + written) / 1e6:.1f} | "
                f"{flops / (read + written):.0f} | {read / 1e6:.1f} | {flops / read:.0f} |"
            )
    return "\n".join(lines)


def measurements_table(kernels: list[Kernel]) -> str:
    """Return one row for all architectures, and both 16-bit elements, on which a kernel has the same figures."""
    elements: dict[tuple[str, str, Figures], list[str]] = {}
    for kernel in kernels:
        tile = kernel.tile
        shape, element = (tile.shape, tile.element) if tile else ("merge", "")
        elements.setdefault((kernel.architecture, shape, kernel.figures), []).append(element)
    architectures: dict[tuple[str, Figures], list[str]] = {}
    for (architecture, shape, figures), names in elements.items():
        for name in ["16-bit", *(set(names) - SIXTEEN_BITS)] if set(names) >= SIXTEEN_BITS else names:
            architectures.setdefault((f"{name} {shape}".strip(), figures), []).append(architecture)
    lines = [
        "| kernel | architectures | registers | of | stack, B | spills | main loop: HMMA | LDSM | LDGSTS | all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = [f"{element} {shape}" for element in ("16-bit", "bfloat16", "float16", "float32") for shape in SHAPES]
    for (name, figures), same in sorted(architectures.items(), key=lambda row: [*order, "merge"].index(row[0][0])):
        numbers = ", ".join(architecture.removeprefix("sm_") for architecture in same)
        loop = figures[4:] if figures.hmma else ["–"] * 4
        lines.append(f"| {name} | sm_{numbers} | {' | '.join(map(str, [*figures[:4], *loop]))} |")
    return "\n".join(lines)


def nvcc_version() -> str:
    """Return the compiler of the installed extension's CUDA kernels."""
    from nemo_ext import _module

    return str(_module.build_facts()["cuda"])


def write(name: str, text: str) -> None:
    """Replace one table in docs/kernels.md."""
    document = DOCUMENT.read_text()
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, document, re.S), f"{DOCUMENT.name} has no table {name}"
    DOCUMENT.write_text(re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", document, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the tables of docs/kernels.md")
    arguments = parser.parse_args()
    kernels = compiled()
    tables = {
        "traffic": traffic_table(),
        "bounds": bounds_table(),
        "measurements": f"{nvcc_version()}\n\n{measurements_table(kernels)}",
    }
    for name, table in tables.items():
        print(f"{table}\n")
        if arguments.write:
            write(name, table)


if __name__ == "__main__":
    main()
