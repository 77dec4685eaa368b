"""The values of a value layer, kept while they are certain to be the same: they don't depend on the timestep.

Keys don't either, but patching leaves every layer besides `to_v` alone.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Entry(NamedTuple):
    input: "weakref.ref[Tensor]"
    #: Emptied when the input dies: "values", and "held", what keeps an id or an address in `state` from being reused.
    kept: dict[str, Any]
    state: tuple[Any, ...]
    version: int


class ValueCache:
    """The last values of one value layer, given again for the same tensor while nothing they depend on has changed.

    A generation passes one text embedding at every step, so that each layer projects it once. There is never more than
    one result, and it goes when its embedding does. In doubt the values are computed: under inference mode, for
    subclasses of tensors, and where a gradient is wanted. What counts as a change is what PyTorch's version counters
    see: writing through `.data`, NumPy or a pointer into an embedding or a weight in use isn't noticed.
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
        """`project(input, weight, bias, scale)`, or what it gave the last time."""
        if not _can_be_kept(input, weight, bias, scale):
            return project(input, weight, bias, scale)
        # Taken before the projection, so that what another thread changes meanwhile doesn't match afterwards.
        state = _state(input, weight, bias, scale)
        entry = self._entry
        if entry is not None and entry.input() is input and entry.state == state:
            values: Tensor = entry.kept["values"]
            # The last caller may have changed them in place, or have asked for their gradient.
            if values._version == entry.version and not values.requires_grad:
                return values
        values = project(input, weight, bias, scale)
        if not values.is_inference():
            # `.data = …`, as in `Module.to`, gives a parameter other memory: its old memory must not be reused for new.
            memory = [parameter.detach() for parameter in (weight, bias) if parameter is not None]
            kept = {"values": values, "held": (weight, bias, scale, memory)}
            # The callback knows `kept` alone: no reference leads back to the cache, its layer or the reference itself.
            dies = weakref.ref(input, lambda _: kept.clear())
            self._entry = _Entry(dies, kept, state, values._version)
        return values


def _can_be_kept(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> bool:
    """Whether there will be no gradient, and whether changes of these tensors can be noticed."""
    # Of subclasses (distributed, quantized, functional_call's) nobody knows what their version counts.
    plain = type(input) is Tensor and type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or not (input.is_cpu or input.is_cuda):
        return False
    tensors = (input, weight, scale) if bias is None else (input, weight, scale, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def _state(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Any, ...]:
    """Equal before and after if the same input would give the same values."""
    device = "cuda" if input.is_cuda else "cpu"
    return (
        input._version,
        # A parameter can be given other memory, or be another view of the same, without being another object.
        *(id(weight), weight._version, weight.data_ptr(), weight.stride()),
        *(() if bias is None else (id(bias), bias._version, bias.data_ptr(), bias.stride())),
        *(id(scale), scale._version),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        # Another stream may come to the values before they are there.
        torch.cuda.current_stream(input.device) if input.is_cuda else None,
    )
