"""The patched value layer: a projection whose neurons have a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext import ops
from nemo_ext.errors import warn
from nemo_ext.patching.value_cache import ValueCache


class LayerCache:
    """What a patched layer caches between calls. The cache is empty in a copied layer and in an unpickled one.

    Attributes:
        values: the cache of the values.
        ones: the scale tensor and its version counter from when all its elements were known to be 1; else None.
    """

    def __init__(self) -> None:
        self.values = ValueCache()
        self.ones: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return LayerCache, ()


class ValueProjection(nn.Linear):
    """A value layer that multiplies each neuron by a scale: v = (e Wᵀ + bias) · s (docs/method.md, section 1).

    `patch` gives this class to the `torch.nn.Linear` that is already there, so its parameters, `state_dict` keys and
    hooks stay. The scale s is the buffer `neuron_scale`, [N] float32 (or [B, N] for the length of a block), which is
    not part of the `state_dict`. It is changed in place, so compiled graphs stay valid.
    """

    neuron_scale: Tensor
    #: The cache that calls in eager mode use.
    kept: LayerCache

    def forward(self, input: Tensor) -> Tensor:
        """Compute v = (e Wᵀ + bias) · s.

        Args:
            input: text embeddings e, [B, T, K].

        Returns:
            The values v, [B, T, N], in the dtype of e.
        """
        if _is_recorded(input):
            # The graph will run later with other neurons off, so it must contain the operator, which reads the buffer.
            return ops.value_projection(input, self.weight, self.bias, self.neuron_scale)
        return self.kept.values.get(self._project, input, self.weight, self.bias, self.neuron_scale)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        if self.is_unscaled():
            return nn.functional.linear(input, weight, bias)
        return ops.value_projection(input, weight, bias, scale)

    def is_unscaled(self) -> bool:
        """Whether all elements of the scale are known to be 1. No data is read from the device."""
        scale, ones = self.neuron_scale, self.kept.ones
        return ones is not None and ones[0] is scale and ones[1] == scale._version and not scale.requires_grad

    def note_scale(self, unscaled: bool) -> None:
        """Record whether all elements of the current scale are 1.

        Args:
            unscaled: whether they are.
        """
        self.kept.ones = (self.neuron_scale, self.neuron_scale._version) if unscaled else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_unscaled():
            warn(
                "neurons are off, and their weights are written as they are: loaded again, the neurons are on; "
                "nemo_ext.bake writes a model in which they are off for good"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueProjection:
        # `.half()` and `.to(dtype)` would also convert the scale and round it, so here only its device changes.
        scale, unscaled = self.neuron_scale, self.is_unscaled()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.neuron_scale = scale.to(self.neuron_scale.device)
        self.note_scale(unscaled)
        return self


def _is_recorded(input: Tensor) -> bool:
    """Whether the call is recorded in a graph: by torch.compile, by tracing, or in a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def give_scale(module: nn.Linear, scale: Tensor) -> ValueProjection:
    """Patch the layer if it is not patched, and use the tensor `scale` itself, without a copy, as its scale.

    Args:
        module: a value layer, patched or not.
        scale: [N] or [B, N] float32 on the layer's device.

    Returns:
        The layer.
    """
    module.register_buffer("neuron_scale", scale, persistent=False)
    if not isinstance(module, ValueProjection):
        module.__class__ = ValueProjection
        assert isinstance(module, ValueProjection)
        module.kept = LayerCache()
    return module


def set_scale(module: nn.Linear, scale: Tensor, unscaled: bool) -> None:
    """Patch the layer if it is not patched, and copy `scale` into its scale, in place if the shapes are equal.

    Args:
        module: a value layer, patched or not.
        scale: [N] float32 on any device.
        unscaled: whether all elements of `scale` are 1.
    """
    if isinstance(module, ValueProjection) and module.neuron_scale.shape == scale.shape:
        module.neuron_scale.copy_(scale)
        module.note_scale(unscaled)
    else:
        # A tensor that is created in inference mode could not be changed in place outside of it.
        with torch.inference_mode(False):
            give_scale(module, scale.to(module.weight.device, copy=True)).note_scale(unscaled)


def remove_scale(module: ValueProjection) -> None:
    """Turn a patched layer back into the `torch.nn.Linear` that it was."""
    del module.neuron_scale
    del module.kept
    module.__class__ = nn.Linear  # type: ignore[assignment]
