"""A cache of the values of one value layer. Values depend on the text and not on the timestep, so they can be reused.

The same holds for the keys of a cross-attention, but patching changes no layer except `to_v`.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Entry(NamedTuple):
    input: "weakref.ref[Tensor]"
    #: "values": the cached values. "references": the objects whose id or address is part of `state`; while they are
    #: alive, no other object can get the same id or address. The dictionary is cleared when the input is deleted.
    cached: dict[str, Any]
    state: tuple[Any, ...]
    version: int


class ValueCache:
    """The last values of one value layer, which are returned again if their input is the same and nothing has changed.

    A generation passes the same text embedding at every step, so with the cache each layer projects it once. The cache
    has at most one entry, which is deleted together with its text embedding. Values are always computed under inference
    mode, for subclasses of tensors, and if a gradient is needed. Changes are detected by PyTorch's version counters, so
    writing to an embedding or a weight through `.data`, NumPy or a pointer is not detected.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(
        self,
        project: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
    ) -> Tensor:
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
        if not _can_be_cached(input, weight, bias, scale):
            return project(input, weight, bias, scale)
        # The state is read before the projection, so the entry will not match if another thread changes a tensor now.
        state = _state(input, weight, bias, scale)
        entry = self._entry
        if entry is not None and entry.input() is input and entry.state == state:
            values: Tensor = entry.cached["values"]
            # The last caller may have changed the values in place, or set `requires_grad` on them.
            if values._version == entry.version and not values.requires_grad:
                return values
        values = project(input, weight, bias, scale)
        if not values.is_inference():
            # `Module.to` assigns to `.data`, which gives a parameter another storage. The old storage is referenced,
            # because its address could otherwise be reused for other weights.
            storages = [parameter.detach() for parameter in (weight, bias) if parameter is not None]
            cached = {"values": values, "references": (weight, bias, scale, storages)}
            # The callback refers to `cached` alone. A reference to the cache would keep the layer alive.
            reference = weakref.ref(input, lambda _: cached.clear())
            self._entry = _Entry(reference, cached, state, values._version)
        return values


def _can_be_cached(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> bool:
    """Whether no gradient is needed and changes of these tensors can be detected."""
    # A subclass of tensors (distributed, quantized, in functional_call) may not count its changes in `_version`.
    plain = type(input) is Tensor and type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or not (input.is_cpu or input.is_cuda):
        return False
    tensors = (input, weight, scale) if bias is None else (input, weight, scale, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def _state(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Any, ...]:
    """Everything that the values depend on besides the identity of the input. Equal states mean equal values."""
    device = "cuda" if input.is_cuda else "cpu"
    return (
        input._version,
        # The same parameter object can get another storage, or become another view of the same storage.
        *(id(weight), weight._version, weight.data_ptr(), weight.stride()),
        *(() if bias is None else (id(bias), bias._version, bias.data_ptr(), bias.stride())),
        *(id(scale), scale._version),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        # Another stream could read the values before they have been computed.
        torch.cuda.current_stream(input.device) if input.is_cuda else None,
    )
