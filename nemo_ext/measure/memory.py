"""Memory: how many latents fit into one call of the denoiser, and how one batch reuses what the last one freed."""

from __future__ import annotations

import weakref
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_ext.measure.noise import DEFAULT_BATCH_SIZE, evaluate_zeros
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled

#: The share of the free memory for the tensors of one call. The rest is for kernels' workspaces of unknown size.
_SHARE_OF_A_CALL = 0.25


def free_bytes(device: torch.device) -> int:
    """The memory that new tensors can use on a device, in bytes: free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def fitting_batch_size(pipe: Any, hidden: Tensor) -> int:
    """The number of latents with which the tensors of one call of the denoiser take a quarter of the free memory.

    The denoiser is called with one latent of zeros, and the peak memory of the tensors is measured. With a compiled
    denoiser that is not possible, and the result is ten.

    Args:
        pipe: a pipeline.
        hidden: any text embedding, [1, T, K].

    Returns:
        The batch size, 1 or more.
    """
    denoiser: Any = family_of(pipe).denoiser(pipe)
    if is_compiled(denoiser):
        return DEFAULT_BATCH_SIZE
    with evaluating(pipe), PeakBytes() as made:
        evaluate_zeros(pipe, hidden, rows=1)
    rows: int = int(_SHARE_OF_A_CALL * free_bytes(denoiser.device)) // max(made.peak, 1)
    return max(1, rows)


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
