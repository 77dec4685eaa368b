"""How many latents a U-Net is given at once: what they take is measured, what is free is asked for."""

import platform
import subprocess
import sys
import textwrap

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipeline import TEXT_WIDTH, tiny_pipeline

from nemo_ext import memory
from nemo_ext.memory import PeakBytes, evaluate_zeros, free_bytes, rows_that_fit

HIDDEN = torch.zeros(1, 5, TEXT_WIDTH)
FLOATS = 1000


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_pipeline().unet


class TestPeakBytes:
    def test_counts_what_is_there_at_the_same_time(self) -> None:
        given = torch.zeros(FLOATS)
        with PeakBytes() as made:
            first = given + 1
            second = first + 1
            del first
            third = second + 1
            del second, third
        assert made.peak == 2 * 4 * FLOATS

    def test_views_and_changes_in_place_take_nothing(self) -> None:
        given = torch.zeros(FLOATS)
        with PeakBytes() as made:
            given.view(10, -1).T.add_(1)
        assert made.peak == 0

    def test_of_a_unet_grows_with_the_rows_alone(self, unet: UNet2DConditionModel) -> None:
        peaks = []
        for rows in (1, 2, 4):
            with PeakBytes() as made:
                evaluate_zeros(unet, HIDDEN, rows)
            peaks.append(made.peak)
        assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.05)
        assert peaks[2] == pytest.approx(4 * peaks[0], rel=0.05)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
@pytest.mark.parametrize("process", range(3))
def test_freed_memory_is_used_again_without_being_cleared(process: int) -> None:
    """Each of the 4,096 pages that the system clears is a fault. Without the call about every second process has them
    in every round, where nothing small happens to lie behind the tensors."""
    script = """
        import resource, statistics, torch
        from nemo_ext.memory import keep_freed_memory

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        def pages_cleared():
            before = faults()
            tensors = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(16)]
            del tensors
            return faults() - before

        keep_freed_memory()
        print(int(statistics.median(pages_cleared() for _ in range(20))))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 400


@pytest.mark.parametrize(("rows", "wanted"), [(8.5, 8), (0.1, 1)])
def test_rows_fit_into_a_quarter_of_what_is_free_and_one_always_does(
    unet: UNet2DConditionModel, rows: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PeakBytes() as made:
        evaluate_zeros(unet, HIDDEN, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(4 * rows * made.peak))
    assert rows_that_fit(unet, HIDDEN) == wanted


def test_free_on_the_cpu_is_what_the_system_has_available() -> None:
    assert free_bytes(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_free_on_a_gpu_counts_what_pytorch_keeps_and_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(torch.device("cuda", 0)) == 1300
