"""The patched value layer: a projection whose neurons have a scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo_ext import ops
from nemo_ext.patching.value_cache import ValueCache


class LayerCache:
    """What a patched layer keeps from one call to the next. It is empty in a copy, and in a layer read from a file.

    Attributes:
        values: the values of the last text embedding.
        ones: the scale and its version when the scale was known to be 1 everywhere; else None.
    """

    def __init__(self) -> None:
        self.values = ValueCache()
        self.ones: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return LayerCache, ()


class ValueProjection(nn.Linear):
    """A value layer whose neurons can be scaled: v = (e Wᵀ + bias) · s (docs/method.md, section 1).

    `patch` gives this class to the `torch.nn.Linear` that is already there, so its parameters, `state_dict` keys and
    hooks stay. The scale s is the buffer `neuron_scale`, [N] float32 (or [B, N] for the length of a block), which is
    not part of the `state_dict`. It is changed in place, so compiled graphs stay valid.
    """

    neuron_scale: Tensor
    #: What calls in eager mode keep for later calls.
    kept: LayerCache

    def forward(self, input: Tensor) -> Tensor:
        """v, [B, T, N], of text embeddings e, [B, T, K], in the dtype of e."""
        if _is_recorded(input):
            # The graph will run again with other neurons off; the operator reads them from the buffer.
            return ops.value_projection(input, self.weight, self.bias, self.neuron_scale)
        return self.kept.values.get(self._project, input, self.weight, self.bias, self.neuron_scale)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        if self.is_unscaled():
            return nn.functional.linear(input, weight, bias)
        return ops.value_projection(input, weight, bias, scale)

    def is_unscaled(self) -> bool:
        """Whether the scale is known to be 1 everywhere. This reads nothing from the device."""
        scale, ones = self.neuron_scale, self.kept.ones
        return ones is not None and ones[0] is scale and ones[1] == scale._version and not scale.requires_grad

    def note_scale(self, unscaled: bool) -> None:
        """Note whether the scale, as it is now, is 1 everywhere."""
        self.kept.ones = (self.neuron_scale, self.neuron_scale._version) if unscaled else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueProjection:
        # `.half()` and `.to(dtype)` would round the scale as well, so only its device is changed.
        scale, unscaled = self.neuron_scale, self.is_unscaled()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.neuron_scale = scale.to(self.neuron_scale.device)
        self.note_scale(unscaled)
        return self


def _is_recorded(input: Tensor) -> bool:
    """Whether the call becomes part of a graph: of torch.compile, of a trace, or a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def give_scale(module: nn.Linear, scale: Tensor) -> ValueProjection:
    """Make the tensor `scale` itself the layer's scale, and the layer a patched one if it is not."""
    module.register_buffer("neuron_scale", scale, persistent=False)
    if not isinstance(module, ValueProjection):
        module.__class__ = ValueProjection
        assert isinstance(module, ValueProjection)
        module.kept = LayerCache()
    return module


def set_scale(module: nn.Linear, scale: Tensor, unscaled: bool) -> None:
    """Give the layer the values of `scale`, in place where that is possible.

    Args:
        module: a value layer, patched or not.
        scale: [N] float32 on any device.
        unscaled: whether all of them are 1.
    """
    if isinstance(module, ValueProjection) and module.neuron_scale.shape == scale.shape:
        module.neuron_scale.copy_(scale)
        module.note_scale(unscaled)
    else:
        # An inference tensor could never be changed again outside inference mode.
        with torch.inference_mode(False):
            give_scale(module, scale.to(module.weight.device, copy=True)).note_scale(unscaled)


def remove_scale(module: ValueProjection) -> None:
    """Make a patched layer the `torch.nn.Linear` again that it was."""
    del module.neuron_scale
    del module.kept
    module.__class__ = nn.Linear  # type: ignore[assignment]
