"""A cache of the values of one value layer. Values depend on the text and not on the timestep, so they can be reused.

The same holds for the keys of a cross-attention, but patching changes no layer except `to_v`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Computes the values of a text: (e, W, bias, s) -> v.
Projection = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


class _Entry(NamedTuple):
    """Values, and a copy of everything that they were computed from."""

    inputs: tuple[Tensor | None, ...]
    autocast: torch.dtype | None
    values: Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether the last caller has neither changed the values in place nor set `requires_grad` on them."""
        return self.values._version == self.version and not self.values.requires_grad


class ValueCache:
    """The last values of one value layer, which are returned again if everything that they depend on is the same.

    A generation passes the same text embedding at every step, so with the cache each layer projects it once. The cache
    compares contents with copies, because PyTorch does not count a change through `.data` (as averages of weights are
    written), NumPy or a pointer; a comparison takes a small part of a projection's time. On CUDA, where it would wait
    for the GPU, values are always computed; so are they under inference mode, for subclasses of tensors, and if a
    gradient is needed.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, project: Projection, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        """Return `project(input, weight, bias, scale)`, from the cache if possible.

        Args:
            project: the function that computes the values.
            input: text embeddings e, [B, T, K].
            weight: [N, K].
            bias: [N] or None.
            scale: [N] or [B, N].

        Returns:
            The values, [B, T, N]. From the cache it is the same tensor as before.
        """
        inputs = (input, weight, bias, scale)
        if not _can_be_cached(*inputs):
            return project(*inputs)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        entry = self._entry
        if entry is not None and entry.autocast == autocast and entry.is_unchanged() and _equal(entry.inputs, inputs):
            return entry.values
        # They are copied before the projection, so the entry will not match if another thread changes a tensor now.
        copies = tuple(None if tensor is None else tensor.detach().clone() for tensor in inputs)
        values = project(*inputs)
        self._entry = _Entry(copies, autocast, values, values._version)
        return values


def _can_be_cached(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> bool:
    """Whether no gradient is needed, and these tensors can be compared without waiting for a GPU."""
    plain = type(input) is Tensor and type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or torch.is_inference_mode_enabled() or torch._C._functorch.is_functorch_wrapped_tensor(input):
        return False
    tensors = (input, weight, scale) if bias is None else (input, weight, scale, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.is_cpu for tensor in tensors)


def _equal(copies: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> bool:
    """Whether all tensors have the shape, the dtype and the elements of their copies."""
    for copy, tensor in zip(copies, inputs, strict=True):
        if copy is None or tensor is None:
            if copy is not tensor:
                return False
        elif copy.dtype != tensor.dtype or not torch.equal(copy, tensor):
            return False
    return True
