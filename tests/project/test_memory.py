"""Memory stays flat however often operators are called and pipelines are patched."""

import gc
from collections.abc import Callable

import psutil
import torch
from tiny_pipeline import planted_pipeline

from nemo_ext import ops, patch, unpatch

MIB = 2**20


def growth(call: Callable[[], object], times: int) -> float:
    """By how many MiB this process grows over the second half of `times` calls; the first half fills caches."""
    process = psutil.Process()
    seen = []
    for _ in range(2):
        for _ in range(times // 2):
            call()
        gc.collect()
        seen.append(process.memory_info().rss)
    return (seen[1] - seen[0]) / MIB


def test_ten_thousand_operator_calls() -> None:
    hidden, weight = torch.randn(2, 77, 64), torch.randn(96, 64)
    scale = torch.ones(2, 96)
    count, mean, m2 = (torch.zeros(shape, dtype=torch.float64) for shape in ((), (96,), (96,)))

    def call() -> None:
        ops.value_projection(hidden, weight, None, scale)
        ops.value_projection_stats(hidden, weight, None, scale, None, count, mean, m2)

    assert growth(call, 5_000) < 2  # a leak of one result of 58 KiB a call would be 141 MiB


def test_a_thousand_times_patched_and_unpatched() -> None:
    planted = planted_pipeline()

    def call() -> None:
        patch(planted.pipe, planted.neurons)
        unpatch(planted.pipe)

    assert growth(call, 1_000) < 4
