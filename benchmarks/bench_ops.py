"""Value projection and statistics against eager PyTorch: verified first, then timed in turns.

Run `python benchmarks/bench_ops.py [--quick]`. One thread, so that a busy machine shifts both sides alike; every
ratio is of medians of calls that alternate, A B C A B C, never of separate runs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from nemo_ext import _module, ops, reference

TOKENS, IN_FEATURES = 77, 768
BATCHES = (1, 8, 64)
OUT_FEATURES = (320, 640, 5760)  # one layer, a wider one, and all seven of SD1.x stacked
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def buffers(out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((), out_features, out_features)]
    return zeros[0], zeros[1], zeros[2]


def eager(hidden: Tensor, weight: Tensor, scale: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """What the operator replaces, written with PyTorch's own operators."""
    projected = linear(hidden, weight)
    activation = projected.abs().mean(1, dtype=torch.float32)
    added = activation.shape[0]
    difference = activation.mean(0) - mean
    m2 += activation.var(0, correction=0) * added + difference.square() * (count * added / (count + added))
    mean += difference * (added / (count + added))
    count += added
    return projected * scale.to(projected.dtype)


def verify(hidden: Tensor, weight: Tensor, scale: Tensor) -> None:
    """At most twice the rounding error of eager PyTorch against float64; the statistics as float64 has them."""
    out_features = weight.shape[0]
    ours, theirs, exact = buffers(out_features), buffers(out_features), buffers(out_features)
    values, activation = ops.value_projection_stats(hidden, weight, None, scale, None, *ours)
    eager_values = eager(hidden, weight, scale, *theirs)
    exact_values, exact_activation = reference.value_projection_stats(hidden, weight, None, scale, None, *exact)
    assert values is not None
    assert exact_values is not None
    rounding = torch.finfo(hidden.dtype).eps * exact_values.abs().max()
    allowed = 2 * (eager_values.double() - exact_values).abs().max() + rounding
    assert (values.double() - exact_values).abs().max() <= allowed, "values are less exact than PyTorch's"
    torch.testing.assert_close(activation.double(), exact_activation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-5)


def alternate(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, called in turns for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(calls))]) < 6:
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(of_one[1:]) for name, of_one in times.items()}


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one size for each dtype, a few seconds in all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{cpu_name()}, 1 thread, variant {_module.cpu_capability()}, torch {torch.__version__}, "
        f"nemo_ext {_module.build_facts()['version']} ({_module.build_facts()['compiler']})"
    )
    print(f"T = {TOKENS}, K = {IN_FEATURES}; ms, medians of alternating calls; ratios: higher is better for nemo_ext")
    print(
        f"{'dtype':9}{'B':>4}{'N':>6} | {'values':>8}{'stats':>8}{'both':>8} | {'linear':>8}{'eager':>8} |"
        f"{'linear/values':>14}{'eager/both':>11}{'linear/stats':>13}"
    )
    for dtype in DTYPES:
        for batch in BATCHES[-1:] if arguments.quick else BATCHES:
            for out_features in (640,) if arguments.quick else OUT_FEATURES:
                hidden = torch.randn(batch, TOKENS, IN_FEATURES).to(dtype)
                weight = (torch.randn(out_features, IN_FEATURES) / IN_FEATURES**0.5).to(dtype)
                scale = (torch.rand(out_features) > 0.1).float()
                verify(hidden[:2], weight, scale)
                ours, theirs = buffers(out_features), buffers(out_features)
                calls: dict[str, Callable[[], object]] = {
                    "values": lambda h=hidden, w=weight, s=scale: ops.value_projection(h, w, None, s),
                    "linear": lambda h=hidden, w=weight: linear(h, w),
                    "stats": lambda h=hidden, w=weight, o=ours: ops.value_projection_stats(
                        h, w, None, None, None, *o, return_values=False
                    ),
                    "both": lambda h=hidden, w=weight, s=scale, o=ours: ops.value_projection_stats(
                        h, w, None, s, None, *o
                    ),
                    "eager": lambda h=hidden, w=weight, s=scale, o=theirs: eager(h, w, s, *o),
                }
                with torch.inference_mode():
                    ms = alternate(calls, seconds=0.5 if arguments.quick else 3)
                print(
                    f"{str(dtype)[6:]:9}{batch:4}{out_features:6} | {ms['values']:8.2f}{ms['stats']:8.2f}"
                    f"{ms['both']:8.2f} | {ms['linear']:8.2f}{ms['eager']:8.2f} |{ms['linear'] / ms['values']:14.2f}"
                    f"{ms['eager'] / ms['both']:11.2f}{ms['linear'] / ms['stats']:13.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
