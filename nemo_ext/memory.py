"""Memory: how many latents a U-Net may be given at once, and what a batch leaves for the next."""

from __future__ import annotations

import weakref
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Of free memory, for the tensors of one call of a U-Net: what kernels take for themselves isn't known beforehand.
_SHARE_OF_A_CALL = 0.25


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have on a device: the GPU's, or the machine's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available: int = psutil.virtual_memory().available
    return available


def rows_that_fit(unet: nn.Module, hidden: Tensor) -> int:
    """How many latents a call of a U-Net may have for its tensors to take a quarter of the memory that is free now.

    One latent of zeros is evaluated to see what it takes.

    Args:
        unet: a U-Net in evaluation mode that isn't compiled.
        hidden: any text embedding, [1, T, K].

    Returns:
        1 or more.
    """
    weight = next(unet.parameters())
    with PeakBytes() as made:
        evaluate_zeros(unet, hidden, rows=1)
    return max(1, int(_SHARE_OF_A_CALL * free_bytes(weight.device)) // max(made.peak, 1))


def keep_freed_memory() -> None:
    """Let what one batch frees on the CPU be there for the next, instead of being given back and cleared anew.

    glibc keeps blocks up to the size of the largest that was freed, at most 32 MiB, and twice that at the end of its
    heap; here one is freed. Other C libraries go their own ways.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def evaluate_zeros(unet: nn.Module, hidden: Tensor, rows: int) -> None:
    """Call a U-Net on latents of zeros, to watch it at work.

    Args:
        unet: a U-Net in evaluation mode.
        hidden: any text embedding, [1, T, K].
        rows: how many latents.
    """
    weight = next(unet.parameters())
    config: Any = unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = weight.new_zeros(rows, config.in_channels, height, width)
    with torch.no_grad():
        unet(sample, 1, encoder_hidden_states=hidden.to(weight).expand(rows, -1, -1))


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within a block have at one time.

    Attributes:
        peak: that number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for storage in _storages(result):
            if all(storage is not other for other in given):  # no view, and not changed in place
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
