"""How many latents a U-Net is given at once: what they take is measured, what is free is asked for."""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import TEXT_WIDTH, tiny_pipeline

from nemo_ext.measure import memory
from nemo_ext.measure.memory import PeakBytes, fitting_batch_size, free_bytes, free_in_containers
from nemo_ext.measure.noise import DEFAULT_BATCH_SIZE, evaluate_zeros
from nemo_ext.models.family import TextEmbedding

TEXT = TextEmbedding(torch.zeros(1, 5, TEXT_WIDTH))
FLOATS = 1000


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


class TestContainers:
    """Limits of control groups, version 1 and 2, as Docker, Kubernetes and systemd set them."""

    @staticmethod
    def _group(folder: Path, limit: str, usage: int, cached: int, *, version: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                 2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\n")

    @staticmethod
    def _process(root: Path, text: str) -> None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(text)

    def test_a_containers_limit_counts_without_what_can_be_taken_back(self, tmp_path: Path) -> None:
        self._process(tmp_path, "0::/\n")
        self._group(tmp_path / "sys/fs/cgroup", "1000", 600, 100)
        assert free_in_containers(tmp_path) == [500]

    def test_limits_of_the_groups_around_it_count_too(self, tmp_path: Path) -> None:
        self._process(tmp_path, "0::/slice/scope\n")
        self._group(tmp_path / "sys/fs/cgroup/slice/scope", "max", 600, 0)
        self._group(tmp_path / "sys/fs/cgroup/slice", "900", 700, 50)
        assert free_in_containers(tmp_path) == [250]

    def test_version_1(self, tmp_path: Path) -> None:
        self._process(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
        self._group(tmp_path / "sys/fs/cgroup/memory", "800", 500, 0, version=1)
        assert free_in_containers(tmp_path) == [300]

    def test_more_than_the_limit_in_use_leaves_nothing(self, tmp_path: Path) -> None:
        self._process(tmp_path, "0::/\n")
        self._group(tmp_path / "sys/fs/cgroup", "1000", 1200, 0)
        assert free_in_containers(tmp_path) == [0]

    @pytest.mark.parametrize("text", ["0::/\n", "", None])
    def test_no_limit_or_no_control_groups_at_all(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            self._process(tmp_path, text)
        assert free_in_containers(tmp_path) == []

    def test_the_lowest_limit_is_what_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = memory.free_bytes(torch.device("cpu"))
        monkeypatch.setattr(memory, "free_in_containers", lambda: [1 << 30, 5000])
        assert memory.free_bytes(torch.device("cpu")) == 5000 < machine


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

    def test_of_a_unet_grows_with_the_rows_alone(self, pipe: StableDiffusionPipeline) -> None:
        peaks = []
        for rows in (1, 2, 4):
            with PeakBytes() as made:
                evaluate_zeros(pipe, TEXT, rows)
            peaks.append(made.peak)
        assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.05)
        assert peaks[2] == pytest.approx(4 * peaks[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc from 2.33 on tells what it keeps")
@pytest.mark.parametrize("process", range(3))
def test_freed_memory_is_used_again_without_being_cleared(process: int) -> None:
    """What is mapped for tensors is cleared each time, and so is what the heap gives back to the system and gets again.

    Without the call all of it is mapped. If too small a block were freed, the heap would give back in most processes.
    """
    script = """
        import ctypes, torch
        from nemo_ext.measure.memory import keep_freed_memory

        class Mallinfo2(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

        info = ctypes.CDLL(None).mallinfo2
        info.restype = Mallinfo2

        def tensors():
            before = info().hblkhd
            made = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(16)]
            return made, info().hblkhd - before

        def mapped_and_given_back():
            made, mapped = tensors()
            before = info().arena
            del made
            return mapped, before - info().arena

        alive, mapped = tensors()  # to free them would change what glibc does
        keep_freed_memory()
        # The heap gives back only what nothing lies behind: here is room for all that is small.
        room, behind = [bytes(1000) for _ in range(500)], bytes(1000)
        del room
        rounds = [mapped_and_given_back() for _ in range(20)]
        print(mapped, *map(max, zip(*rounds)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    # A user's settings of glibc would stand in place of what it does by itself.
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=unset)
    mapped_before, mapped, given_back = map(int, done.stdout.split())
    if mapped_before == 0:
        pytest.skip("the allocator is not glibc's: nothing is mapped for tensors in the first place")
    assert (mapped, given_back) == (0, 0)


@pytest.mark.parametrize(("rows", "wanted"), [(8.5, 8), (0.1, 1)])
def test_rows_fit_into_a_quarter_of_what_is_free_and_one_always_does(
    pipe: StableDiffusionPipeline, rows: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PeakBytes() as made:
        evaluate_zeros(pipe, TEXT, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(4 * rows * made.peak))
    assert fitting_batch_size(pipe, TEXT) == wanted


def test_the_denoiser_runs_once_for_each_size_and_precision() -> None:
    pipe = tiny_pipeline()
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert fitting_batch_size(pipe, TEXT) > 1
    assert len(calls) == 1
    pipe.unet.register_to_config(sample_size=32)
    larger = fitting_batch_size(pipe, TEXT)
    pipe.to(torch.bfloat16)
    assert fitting_batch_size(pipe, TEXT) > 1.5 * larger
    assert len(calls) == 3


def test_of_a_compiled_denoiser_the_batch_is_ten() -> None:
    pipe = tiny_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert fitting_batch_size(pipe, TEXT) == DEFAULT_BATCH_SIZE == 10


def test_free_on_the_cpu_is_what_the_system_has_available(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = SimpleNamespace(total=9000, available=5000, free=1000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: numbers)
    assert free_bytes(torch.device("cpu")) == 5000


def test_free_on_a_gpu_counts_what_pytorch_keeps_and_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(torch.device("cuda", 0)) == 1300
