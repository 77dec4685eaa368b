"""The operators against eager PyTorch, torch.compile and the bare GEMM: verified first, then timed in turns.

Run `python benchmarks/bench_ops.py --device cpu|cuda [--quick] [--threads N] [--out DIR]`. Ratios are of medians of
calls that alternate, A B C A B C, never of separate runs; benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nemo_ext import _module, info, ops, reference

TOKENS = 77
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# in_features, the width of the text -> out_features, those of single value layers and of the seven searched ones
LAYERS = {
    768: (320, 640, 1280, 5760),  # Stable Diffusion 1
    1024: (320, 640, 1280, 5760),  # Stable Diffusion 2
    2048: (640, 1280),  # Stable Diffusion XL
}
SHAPES = {  # (batch, in_features, out_features)
    "cpu": [(batch, 768, width) for width in (320, 640, 5760) for batch in (1, 8, 64)],
    "cuda": [(batch, text, width) for text, widths in LAYERS.items() for width in widths for batch in (8, 64, 256)],
}
QUICK_SHAPES = [(8, 768, 640)]

MEASURED = (
    "what",
    "dtype",
    "batch",
    "tokens",
    "in_features",
    "out_features",
    "calls",
    "median_ms",
    "low_ms",
    "high_ms",
)
DERIVED = ("tflops", "gbs", "of_matmul", "of_copy")

Row = dict[str, Any]
Call = Callable[[], object]


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    scale: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor


class Side(NamedTuple):
    """One of those compared: what it runs, and whether values and activations come out."""

    call: Callable[[Inputs], object]
    values: bool
    activation: bool


def eager(
    hidden: Tensor, weight: Tensor, scale: Tensor, count: Tensor, mean: Tensor, m2: Tensor
) -> tuple[Tensor, Tensor]:
    """What the operator replaces, written with PyTorch's own operators."""
    projected = linear(hidden, weight)
    activation = projected.abs().mean(1, dtype=torch.float32)
    added = activation.shape[0]
    difference = activation.mean(0) - mean
    m2 += activation.var(0, correction=0) * added + difference.square() * (count * added / (count + added))
    mean += difference * (added / (count + added))
    count += added
    return projected * scale.to(projected.dtype), activation


def sides() -> dict[str, Side]:
    # Compiled for one shape, as a user's would be after a while; those of earlier shapes are forgotten.
    torch.compiler.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return {
        "values": Side(lambda i: ops.value_projection(i.hidden, i.weight, None, i.scale), True, False),
        "stats": Side(
            lambda i: ops.value_projection_stats(
                i.hidden, i.weight, None, None, None, i.count, i.mean, i.m2, return_values=False
            ),
            False,
            True,
        ),
        "both": Side(
            lambda i: ops.value_projection_stats(i.hidden, i.weight, None, i.scale, None, i.count, i.mean, i.m2),
            True,
            True,
        ),
        "linear": Side(lambda i: linear(i.hidden, i.weight), True, False),
        "eager": Side(lambda i: eager(*i), True, True),
        "compiled": Side(lambda i: compiled(*i), True, True),
    }


def running_buffers(out_features: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), out_features, out_features)]
    return zeros[0], zeros[1], zeros[2]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Inputs]:
    """On a GPU so many that its cache has long lost one when its turn comes again; on the CPU one."""
    batch, in_features, out_features = shape
    number = 1
    if device == "cuda":
        size = dtype.itemsize * in_features * (batch * TOKENS + out_features)
        number += math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    buffers = running_buffers(out_features, device)
    return [
        Inputs(
            torch.randn(batch, TOKENS, in_features, device=device).to(dtype),
            (torch.randn(out_features, in_features, device=device) / in_features**0.5).to(dtype),
            (torch.rand(out_features, device=device) > 0.1).float(),
            *buffers,
        )
        for _ in range(number)
    ]


def verify(inputs: Inputs) -> None:
    """At most twice the rounding error of eager PyTorch against float64; the statistics as float64 has them."""
    hidden, weight, scale = inputs.hidden, inputs.weight, inputs.scale
    ours, theirs, exact = (running_buffers(weight.shape[0], hidden.device.type) for _ in range(3))
    values, activation = ops.value_projection_stats(hidden, weight, None, scale, None, *ours)
    eager_values, _ = eager(hidden, weight, scale, *theirs)
    exact_values, exact_activation = reference.value_projection_stats(hidden, weight, None, scale, None, *exact)
    assert values is not None
    assert exact_values is not None
    rounding = torch.finfo(hidden.dtype).eps * exact_values.abs().max()
    allowed = 2 * (eager_values.double() - exact_values).abs().max() + rounding
    assert (values.double() - exact_values).abs().max() <= allowed, "values are less exact than PyTorch's"
    assert torch.equal(values, ops.value_projection(hidden, weight, None, scale)), "the operators' values differ"
    torch.testing.assert_close(activation.double(), exact_activation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-3, atol=1e-5)


def over(call: Callable[[Inputs], object], inputs: list[Inputs]) -> Call:
    """`call` of all inputs in a row; on a GPU as one graph, so that its kernels are timed and not Python."""

    def row() -> None:
        for one in inputs:
            call(one)

    if inputs[0].hidden.device.type == "cpu":
        return row
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        row()  # loads and compiles, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        row()
    return graph.replay


def milliseconds(call: Call, device: str) -> float:
    if device == "cpu":
        before = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def alternate(calls: dict[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, called in turns for about `seconds` in all, and at least five times after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(calls))]) < 6:
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return {name: of_one[1:] for name, of_one in times.items()}


def row_of(what: str, dtype: torch.dtype, sizes: tuple[int, ...], times: list[float], flop: float, size: float) -> Row:
    """One measurement; a call does `flop` operations, and moves `size` bytes if it reads and writes all once."""
    median = statistics.median(times)
    low, *_, high = statistics.quantiles(times, n=10, method="inclusive")
    measured = (what, str(dtype)[6:], *sizes, len(times), median, low, high)
    return dict(zip(MEASURED, measured, strict=True)) | {"tflops": flop / median / 1e9, "gbs": size / median / 1e6}


def measure_ceilings(device: str, quick: bool) -> list[Row]:
    """A large copy, and for each dtype a large product of matrices: what PyTorch gets out of this machine."""
    size, side = {("cpu", True): (2**26, 1024), ("cpu", False): (2**28, 2048)}.get((device, quick), (2**30, 8192))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    for dtype in DTYPES:
        one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[f"matmul {dtype}"] = lambda one=one, two=two: linear(one, two)
    times = alternate(calls, device, seconds=0.5 if quick else 5)
    rows = [row_of("copy", torch.uint8, (0, 0, 0, 0), times["copy"], 0, 2 * size)]
    for dtype in DTYPES:
        of_one, moved = times[f"matmul {dtype}"], 3 * side**2 * dtype.itemsize
        rows.append(row_of("matmul", dtype, (1, side, side, side), of_one, 2 * side**3, moved))
    return rows


def measure_shape(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    inputs = make_inputs(shape, dtype, device)
    verify(inputs[0])
    compared = sides()
    calls = {name: over(side.call, inputs) for name, side in compared.items()}
    if device == "cuda" and dtype == torch.float32:
        compared["linear_tf32"] = compared["linear"]
        torch.set_float32_matmul_precision("high")
        calls["linear_tf32"] = over(compared["linear"].call, inputs)
        torch.set_float32_matmul_precision("highest")
    batch, in_features, out_features = shape
    flop = 2 * batch * TOKENS * in_features * out_features
    rows = []
    for name, times in alternate(calls, device, seconds).items():
        size = dtype.itemsize * in_features * (batch * TOKENS + out_features)
        size += compared[name].values * dtype.itemsize * batch * TOKENS * out_features
        size += compared[name].activation * 4 * batch * out_features
        sizes = (batch, TOKENS, in_features, out_features)
        rows.append(row_of(name, dtype, sizes, [taken / len(inputs) for taken in times], flop, size))
    return rows


def relate(row: Row, copy: Row, matmuls: list[Row]) -> None:
    """Adds the shares of the ceilings: of the product in the row's dtype, where it computes, and of the copy."""
    matmul = {ceiling["dtype"]: ceiling["tflops"] for ceiling in matmuls}
    row["of_matmul"] = row["tflops"] / matmul.get(row["dtype"], math.inf)
    row["of_copy"] = row["gbs"] / copy["gbs"]


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str:
    """Of this checkout, with "-dirty" where it was changed; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def facts_of_run(device: str, threads: int) -> Row:
    build = _module.build_facts()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "machine": torch.cuda.get_device_name(device) if device == "cuda" else cpu_name(),
        "threads": threads,
        "variant": "" if device == "cuda" else _module.cpu_capability(),
        "nemo_ext": build["version"],
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
    }


def print_row(row: Row, linear_ms: float) -> None:
    sizes = f"{row['batch']:5}{row['tokens']:5}{row['in_features']:5}{row['out_features']:5}"
    speed = f"{row['tflops']:9.3f}{row['of_matmul']:6.2f}{row['gbs']:9.1f}{row['of_copy']:6.2f}"
    print(
        f"{row['dtype']:9}{sizes}  {row['what']:12}{row['median_ms']:10.4f}{speed}{linear_ms / row['median_ms']:9.2f}",
        flush=True,
    )


def write_csv(rows: list[Row], facts: Row, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *MEASURED, *DERIVED])
        writer.writeheader()
        writer.writerows(facts | row for row in rows)


def plot(rows: list[Row], ceilings: list[Row], facts: Row, path: Path) -> None:
    """TFLOP/s over shapes, a panel for each dtype, the measured ceiling of a large product above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["in_features"], row["out_features"], row["batch"]) for row in rows))
    figure, panels = pyplot.subplots(
        len(DTYPES), sharex=True, layout="constrained", figsize=(4 + 0.4 * len(shapes), 3.2 * len(DTYPES))
    )
    for dtype, panel in zip((str(dtype)[6:] for dtype in DTYPES), panels, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for what in dict.fromkeys(row["what"] for row in of_dtype):
            points = [row["tflops"] for row in of_dtype if row["what"] == what]
            panel.plot(range(len(shapes)), points, "o-" if what in ("values", "stats", "both") else "x:", label=what)
        (ceiling,) = (row["tflops"] for row in ceilings if row["dtype"] == dtype)
        panel.axhline(ceiling, color="black", linewidth=1, label="large matmul")
        panel.set(title=dtype, ylabel="TFLOP/s", ylim=(0, None))
    panels[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].set_xticks(range(len(shapes)), [f"{k} to {n}, B {b}" for k, n, b in shapes], rotation=90)
    figure.suptitle(f"{facts['machine']}, T = {TOKENS}, torch {facts['torch']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; one keeps other work out of the ratios")
    parser.add_argument("--quick", action="store_true", help="one shape for each dtype, in less than a minute")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench_ops-DEVICE.csv and .png there")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda":
        gpus = info.gpus()
        obstacle = (
            info.cuda_obstacle(_module.build_facts(), gpus[0]) if gpus else f"torch {torch.__version__} sees no GPU"
        )
        if obstacle:
            parser.error(f"--device cuda: {obstacle}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    facts = facts_of_run(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value != ""))
    print(
        f"{'dtype':9}{'B':>5}{'T':>5}{'K':>5}{'N':>5}  {'what':12}{'ms':>10}{'TFLOP/s':>9}{'of mm':>6}{'GB/s':>9}"
        f"{'of cp':>6}{'linear/':>9}"
    )
    rows: list[Row] = []
    with torch.inference_mode():
        copy, *matmuls = ceilings = measure_ceilings(device, arguments.quick)
        for row in ceilings:
            relate(row, copy, matmuls)
            print_row(row, row["median_ms"])
        for shape in QUICK_SHAPES if arguments.quick else SHAPES[device]:
            for dtype in DTYPES:
                measured = measure_shape(shape, dtype, device, seconds=1 if arguments.quick else 3)
                (linear_ms,) = (row["median_ms"] for row in measured if row["what"] == "linear")
                for row in measured:
                    relate(row, copy, matmuls)
                    print_row(row, linear_ms)
                rows += measured
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv([*ceilings, *rows], facts, arguments.out / f"bench_ops-{device}.csv")
        plot(rows, matmuls, facts, arguments.out / f"bench_ops-{device}.png")


if __name__ == "__main__":
    main()
