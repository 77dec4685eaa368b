"""Memory: how many latents fit into one call of the denoiser, and how one batch reuses what the last one freed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_ext.measure.noise import DEFAULT_BATCH_SIZE, evaluate_zeros
from nemo_ext.models.family import TextEmbedding
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled

#: The share of the free memory for the tensors of one call. The rest is for kernels' workspaces of unknown size.
_SHARE_OF_A_CALL = 0.25

# The peak memory of calls of each denoiser with one latent, in bytes, by what it depends on.
_peaks: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = weakref.WeakKeyDictionary()


def free_bytes(device: torch.device) -> int:
    """The memory that new tensors can use on a device, in bytes: free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(int(psutil.virtual_memory().available), *free_in_containers())


def free_in_containers(root: Path = Path("/")) -> list[int]:
    """The memory that each limit on this process leaves, in bytes: of its control group, and of those around it.

    A container's limit is lower than the machine's memory, and a process that exceeds it is killed. Memory that the
    kernel can take back, such as file caches, counts as free.

    Args:
        root: the root of the file system, where /proc and /sys are.

    Returns:
        One number for each limit; no number if there is none, or on a system without control groups.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = mount / path.lstrip("/")
        # Inside a container, the path can be one that only the host has; then the mounted root is the container's
        # group.
        for folder in (own, *own.parents):
            left = _free_in(folder, *names)
            if left is not None:
                free.append(left)
            if folder == mount:
                break
    return free


def _free_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """The memory that the limit of one control group leaves, in bytes; None if it has no limit."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return max(0, most - used + int(counts.get(reclaimable, 0)))


def fitting_batch_size(pipe: Any, text: TextEmbedding) -> int:
    """The number of latents with which the tensors of one call of the denoiser take a quarter of the free memory.

    The denoiser is called with one latent of zeros, and the peak memory of the tensors is measured. The peak is known
    from then on for this denoiser, size of latents and of texts, and precision. With a compiled denoiser it cannot be
    measured, and the result is ten.

    Args:
        pipe: a pipeline.
        text: the embedding of any text.

    Returns:
        The batch size, 1 or more.
    """
    denoiser: Any = family_of(pipe).denoiser(pipe)
    if is_compiled(denoiser):
        return DEFAULT_BATCH_SIZE
    peaks = _peaks.setdefault(denoiser, {})
    call = (family_of(pipe).latent_shape(pipe), text.hidden.shape[1:], denoiser.dtype, denoiser.device)
    if call not in peaks:
        with evaluating(pipe), PeakBytes() as made:
            evaluate_zeros(pipe, text, rows=1)
        peaks[call] = max(made.peak, 1)
    return max(1, int(_SHARE_OF_A_CALL * free_bytes(denoiser.device)) // peaks[call])


def keep_freed_memory() -> None:
    """Raise glibc's mmap and trim thresholds, so that the next batch reuses memory that the last one freed.

    glibc sets its mmap threshold to the size of the largest block that was freed, at most 32 MiB, and its trim
    threshold to twice that; so this frees one block of 31 MiB. Other C libraries are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class PeakBytes(TorchDispatchMode):
    """A context manager that measures the peak memory of the tensors that are created in its block.

    Attributes:
        peak: the peak so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now: int = 0
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_arguments = _storages((args, kwargs))
        for storage in _storages(result):
            if all(storage is not other for other in of_arguments):  # neither a view nor changed in place
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            del self._watched[key]
            self._now -= size

        self._watched[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
