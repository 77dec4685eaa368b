"""What can happen to a pipeline after patching so that its neurons come on again, and how the caller is told."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from nemo_ext.errors import NemoError, warn
from nemo_ext.models.family import unwrapped
from nemo_ext.models.layers import is_fused
from nemo_ext.models.registry import denoiser_of, family_of
from nemo_ext.models.state import is_compiled
from nemo_ext.patching.value_projection import ValueProjection


class _AttentionGuard:
    """A forward hook of a cross-attention: an error, if the attention does not use its patched value layer."""

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __call__(self, attention: Any, args: Any) -> None:
        if is_fused(attention):
            raise NemoError(
                f"{self._layer} was fused with to_k after patching, so its neurons would be on: call "
                "unfuse_qkv_projections(), or unpatch the pipeline"
            )
        layer = attention.to_v
        if isinstance(layer, ValueProjection) or any(
            isinstance(h, _ScaledWrapper) for h in layer._forward_hooks.values()
        ):
            return
        raise NemoError(
            f"{self._layer} was replaced by {type(layer).__module__}.{type(layer).__qualname__} after patching, so its "
            "neurons would be on: patch the pipeline again, or unpatch it"
        )


class _ScaledWrapper:
    """A forward hook of a module around a patched value layer, such as a LoRA's: it scales what the module adds.

    The module computes y = b + Δ, where b is the output of the value layer, which has the scale s already. The hook
    returns b + Δ · s, so neurons that are off stay off.
    """

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        layer = module.base_layer
        if not isinstance(layer, ValueProjection) or layer.is_unscaled():
            return None
        scale = layer.neuron_scale.to(output.dtype)
        if scale.dim() == 2:  # one scale for each row of the batch
            scale = scale[:, None]
        base = layer(*args)
        return torch.where(scale == 1, output, base + (output - base) * scale)


def _scale_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """A hook of the registration of modules in modules: it finds new modules around patched value layers."""
    if name == "base_layer" and isinstance(submodule, ValueProjection):
        module.register_forward_hook(_ScaledWrapper())


@functools.cache
def _watch_for_wrappers() -> None:
    """Call `_scale_wrapper` for every module that is registered in another one from now on, once in a process."""
    register_module_module_registration_hook(_scale_wrapper)


class _DenoiserWatch:
    """A forward hook of a text encoder: a warning, if the pipeline's denoiser is no longer the patched one."""

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        self._pipe, self._denoiser = weakref.ref(pipe), weakref.ref(denoiser)

    def __call__(self, text_encoder: Any, args: Any) -> None:
        pipe = self._pipe()
        if pipe is not None and denoiser_of(pipe) is not self._denoiser():
            warn(
                "the denoiser of this pipeline was replaced after patching, and no neuron of the new one is off: patch "
                "the pipeline again, or unpatch it"
            )

    def watches(self, pipe: Any) -> bool:
        """Whether the hook belongs to this pipeline."""
        return self._pipe() is pipe

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled pipeline has its own denoiser, which this hook does not know.
        return _Nothing, ()


class _Nothing:
    """A forward hook that does nothing."""

    def __call__(self, module: Any, args: Any) -> None: ...


def guard(pipe: Any, denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Tell the caller at the next call, if what was done after patching brings neurons on again.

    Args:
        pipe: a pipeline, or its denoiser.
        denoiser: its denoiser, without wrappers.
        layers: layer name -> value layer, for all value layers.
    """
    _watch_for_wrappers()
    for layer in layers:
        attention = denoiser.get_submodule(layer.rpartition(".")[0])
        _remove(attention, _AttentionGuard)
        attention.register_forward_pre_hook(_AttentionGuard(layer))
    for encoder in _text_encoders(pipe):
        if not is_compiled(encoder):
            _remove(encoder, _DenoiserWatch, pipe)
            encoder.register_forward_pre_hook(_DenoiserWatch(pipe, denoiser))


def unguard(pipe: Any, denoiser: nn.Module) -> None:
    """Undo `guard`."""
    for module in denoiser.modules():
        _remove(module, _AttentionGuard)
    for encoder in _text_encoders(pipe):
        _remove(encoder, _DenoiserWatch, pipe)


def _text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders of a pipeline, without wrappers; none for a denoiser."""
    family = family_of(pipe)
    if family.denoiser(pipe) is pipe:
        return []
    return [unwrapped(encoder) for encoder in family.text_encoders(pipe).values() if isinstance(encoder, nn.Module)]


def _remove(module: nn.Module, kind: type, pipe: Any = None) -> None:
    """Remove the hooks of a kind from a module: all of them, or those that watch a pipeline."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kind) and (pipe is None or not isinstance(hook, _DenoiserWatch) or hook.watches(pipe)):
            del module._forward_pre_hooks[key]
