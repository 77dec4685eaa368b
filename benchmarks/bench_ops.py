"""Compares the operators with eager PyTorch, torch.compile and the matrix product alone: verified first, then timed.

Run `python benchmarks/bench_ops.py --device cpu|cuda [--quick] [--threads N] [--out DIR] [--compare CSV]`. Calls
alternate, A B C A B C, and a ratio is a ratio of medians of the same run. benchmarks/README.md describes the sides and
the columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from harness import Call, Panel, Row, Run, alternate, measured, parser
from torch import Tensor
from torch.nn.functional import linear

from nemo_ext import ops, reference

TOKENS = 77
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# in_features, the width of the text -> out_features of single value layers, and of the seven searched ones together
LAYERS = {
    768: (320, 640, 1280, 5760),  # Stable Diffusion 1
    1024: (5760,),  # Stable Diffusion 2, whose widths are the same
    2048: (640, 1280),  # Stable Diffusion XL
}
SHAPES = {  # (batch, in_features, out_features)
    "cpu": [(batch, 768, width) for width in (320, 640, 5760) for batch in (1, 8, 64, 256)],
    "cuda": [(batch, text, width) for text, widths in LAYERS.items() for width in widths for batch in (8, 64, 256)],
}
ONE_THREAD = " on one thread"
PATHS = ("kernel", "library")  # docs/kernels.md
PATIENCE = 6  # seconds that one product may take: on some CPUs it is slow in half precision
QUICK_SHAPES = [(8, 768, 640)]
SECONDS = {"cpu": 3.0, "cuda": 0.3}  # for one shape and dtype; on a GPU these are hundreds of calls

KEYS = ("what", "dtype", "batch", "tokens", "in_features", "out_features")
SHOWN = (
    *("median_ms", "tflops", "of_matmul", "gbs", "of_copy"),
    *("over_linear", "over_onednn", "over_eager", "over_one_thread"),
)


class Inputs(NamedTuple):
    """The arguments of one call, with the names and shapes of the operators' arguments."""

    hidden: Tensor
    weight: Tensor
    scale: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor


class Side(NamedTuple):
    """One of the things that are compared.

    Attributes:
        call: what it runs.
        values: whether it returns values.
        activation: whether it returns activations.
    """

    call: Callable[[Inputs], object]
    values: bool
    activation: bool


def eager(
    hidden: Tensor, weight: Tensor, scale: Tensor, count: Tensor, mean: Tensor, m2: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what the operator does with PyTorch's own operators."""
    projected = linear(hidden, weight)
    activation = projected.abs().mean(1, dtype=torch.float32)
    added = activation.shape[0]
    difference = activation.mean(0) - mean
    m2 += activation.var(0, correction=0) * added + difference.square() * (count * added / (count + added))
    mean += difference * (added / (count + added))
    count += added
    return projected * scale.to(projected.dtype), activation


def sides() -> dict[str, Side]:
    """Return the sides that are compared: name -> side."""
    # The compiled function is for one shape, as in a program that has run for a while. Functions for earlier shapes are
    # discarded.
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


def on_path(path: str, call: Callable[[Inputs], object]) -> Callable[[Inputs], object]:
    """Return a call on one path of the CUDA kernels, whichever is the default."""

    def chosen(inputs: Inputs) -> object:
        with mock.patch.dict(os.environ, NEMO_EXT_CUDA_PATH=path):
            return call(inputs)

    return chosen


def running_buffers(out_features: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty statistics: count, mean and m2."""
    zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), out_features, out_features)]
    return zeros[0], zeros[1], zeros[2]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Inputs]:
    """Return one set of inputs on the CPU, and on a GPU so many that its cache evicts a set before its next use."""
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
    """Compare the operators with float64. The bound of the error holds for a float32 sum in any order of its terms."""
    hidden, weight, scale = inputs.hidden, inputs.weight, inputs.scale
    ours, exact = (running_buffers(weight.shape[0], hidden.device.type) for _ in range(2))
    values, activation = ops.value_projection_stats(hidden, weight, None, scale, None, *ours)
    exact_values, exact_activation = reference.value_projection_stats(hidden, weight, None, scale, None, *exact)
    assert values is not None
    assert exact_values is not None
    # √K roundings of Σ|e||w|: Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019.
    size = reference.value_projection(hidden.abs(), weight.abs(), None, scale.abs())
    allowed = math.sqrt(hidden.shape[-1]) * 2**-24 * size + torch.finfo(hidden.dtype).eps * exact_values.abs()
    assert ((values.double() - exact_values).abs() <= allowed).all(), "values are less exact than a sum in float32"
    assert torch.equal(values, ops.value_projection(hidden, weight, None, scale)), "the operators' values differ"
    torch.testing.assert_close(activation.double(), exact_activation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-3, atol=1e-5)


def over(call: Callable[[Inputs], object], inputs: list[Inputs]) -> Call:
    """Return a call of all inputs in a row; on a GPU one CUDA graph, so that kernels are timed and not Python."""

    def row() -> None:
        for one in inputs:
            call(one)

    if inputs[0].hidden.device.type == "cpu":
        return row
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        row()  # loading and compiling cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        row()
    return graph.replay


def on_one_thread(call: Call) -> Call:
    """Return a call that runs on one thread and then restores the number of threads."""

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        call()
        torch.set_num_threads(threads)

    return alone


def flop_of(shape: tuple[int, int, int]) -> float:
    """Return the number of floating-point operations of the product."""
    return 2 * TOKENS * math.prod(shape)


def work(flop: float, size: float, row: Row) -> Row:
    """Return the speeds of a call with `flop` operations and `size` bytes, if each is read or written once."""
    return {"tflops": flop / row["median_ms"] / 1e9, "gbs": size / row["median_ms"] / 1e6}


def measure_ceilings(device: str, quick: bool) -> list[Row]:
    """Measure what PyTorch reaches on this machine: a large copy, and for each dtype a large matrix product."""
    size, side = {("cpu", True): (2**26, 1024), ("cpu", False): (2**28, 2048)}.get((device, quick), (2**30, 8192))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    for dtype in DTYPES:
        one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[f"matmul {dtype}"] = lambda one=one, two=two: linear(one, two)
    rows = measured(alternate(calls, device=device, seconds=0.5 if quick else 5))
    copied = rows["copy"]
    ceilings = [dict(zip(KEYS, ("copy", "uint8", 0, 0, 0, 0), strict=True)) | copied | work(0, 2 * size, copied)]
    for dtype in DTYPES:
        row, keys = rows[f"matmul {dtype}"], ("matmul", str(dtype)[6:], 1, side, side, side)
        speeds = work(2 * side**3, 3 * side**2 * dtype.itemsize, row)
        ceilings.append(dict(zip(KEYS, keys, strict=True)) | row | speeds)
    return ceilings


def measure_shape(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    """Verify and time all sides for one shape and dtype. Return one row for each side."""
    inputs = make_inputs(shape, dtype, device)
    compared = sides()
    if device == "cuda":
        # The second one is the yardstick of the first: the library's product, and the epilogue as a kernel over it.
        both = compared["both"]
        compared |= {f"both, {path}": both._replace(call=on_path(path, both.call)) for path in PATHS}
    calls = {name: over(side.call, inputs) for name, side in compared.items()}
    if device == "cuda" and dtype == torch.float32:
        compared["linear_tf32"] = compared["linear"]
        torch.set_float32_matmul_precision("high")
        calls["linear_tf32"] = over(compared["linear"].call, inputs)
        torch.set_float32_matmul_precision("highest")
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # `linear` calls MKL, and this product is often faster.
        compared["onednn"] = Side(
            lambda i: torch.ops.mkldnn._linear_pointwise(i.hidden, i.weight, None, "none", [], ""), True, False
        )
        calls["onednn"] = over(compared["onednn"].call, inputs)
    if device == "cpu" and torch.get_num_threads() > 1:
        calls |= {f"{name}{ONE_THREAD}": on_one_thread(calls[name]) for name in ("values", "stats", "both", "linear")}
    batch, in_features, out_features = shape
    flop = flop_of(shape)

    def verify_paths(_results: object) -> None:
        for check in [on_path(path, verify) for path in PATHS] if device == "cuda" else [verify]:
            check(inputs[0])

    times = alternate(calls, device=device, verify=verify_paths, seconds=seconds)
    of_one = {name: [taken / len(inputs) for taken in of_all] for name, of_all in times.items()}
    rows = []
    baselines = [name for name in ("linear", "onednn", "eager") if name in calls]
    all_measured = measured(of_one, baselines)
    for name in compared:
        row = all_measured[name]
        if alone := all_measured.get(f"{name}{ONE_THREAD}"):
            row["over_one_thread"] = alone["median_ms"] / row["median_ms"]
        size = dtype.itemsize * in_features * (batch * TOKENS + out_features)
        size += compared[name].values * dtype.itemsize * batch * TOKENS * out_features
        size += compared[name].activation * 4 * batch * out_features
        keys = (name, str(dtype)[6:], batch, TOKENS, in_features, out_features)
        rows.append(dict(zip(KEYS, keys, strict=True)) | row | work(flop, size, row))
    return rows


def relate(row: Row, copy: Row, matmuls: list[Row]) -> None:
    """Add to a row its speeds as shares of the matrix product in the same dtype and of the copy."""
    matmul = {ceiling["dtype"]: ceiling["tflops"] for ceiling in matmuls}
    row["of_matmul"] = row["tflops"] / matmul.get(row["dtype"], math.inf)
    row["of_copy"] = row["gbs"] / copy["gbs"]


def panels(rows: list[Row], matmuls: list[Row]) -> list[Panel]:
    """Return one panel per dtype with the time for the most neurons, and one per width and dtype with TFLOP/s."""
    widths = sorted({(row["in_features"], row["out_features"]) for row in rows})
    ceilings = {row["dtype"]: row["tflops"] for row in matmuls}

    def of(width: tuple[int, int], dtype: str) -> list[Row]:
        return [row for row in rows if (row["in_features"], row["out_features"], row["dtype"]) == (*width, dtype)]

    widest = widths[-1]
    drawn = [Panel(f"{dtype}, {widest[0]} to {widest[1]}", of(widest, dtype), "batch") for dtype in ceilings]
    for width in widths:
        for dtype, tflops in ceilings.items():
            ours = of(width, dtype)
            above = [{"what": "large matmul", "batch": row["batch"], "tflops": tflops} for row in ours]
            drawn.append(Panel(f"{dtype}, {width[0]} to {width[1]}", [*ours, *above], "batch", "tflops"))
    return drawn


def main() -> None:
    run = Run("bench_ops", parser(__doc__), keys=KEYS, shown=SHOWN)
    rows: list[Row] = []
    with torch.inference_mode():
        copy, *matmuls = ceilings = measure_ceilings(run.device, run.quick)
        tflops = {ceiling["dtype"]: ceiling["tflops"] for ceiling in matmuls}
        for row in ceilings:
            relate(row, copy, matmuls)
            run.add(row)
        for shape in QUICK_SHAPES if run.quick else SHAPES[run.device]:
            for dtype in DTYPES:
                product = flop_of(shape) / 1e12 / tflops[str(dtype)[6:]]
                if product > PATIENCE:
                    print(f"{dtype} {shape} is left out: PyTorch's product alone would take about {product:.0f} s")
                    continue
                for row in measure_shape(shape, dtype, run.device, seconds=1 if run.quick else SECONDS[run.device]):
                    relate(row, copy, matmuls)
                    run.add(row)
                    rows.append(row)
    run.finish(panels(rows, matmuls))


if __name__ == "__main__":
    main()
