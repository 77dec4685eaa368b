"""Patching a pipeline: its neurons become switchable, and some are switched off (docs/method.md, section 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext.errors import NemoError
from nemo_ext.models.layers import unknown_layer, value_layers
from nemo_ext.models.registry import denoiser_of
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.value_projection import ValueProjection, remove_scale, set_scale


class PatchHandle:
    """The value layers of a patched pipeline. It found them once, so changing neurons searches no modules.

    Args:
        layers: layer name -> value layer, all of them, in network order.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = dict(layers)

    def set_neurons(self, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> None:
        """Change which neurons are off, in place: nothing is recompiled.

        Args:
            neurons, scale: as for `patch`.

        Raises:
            NemoError: a layer is no longer patched, or as for `patch`; then nothing has been changed.
        """
        scales = neuron_scales(self.layers, neurons, scale)
        for layer in self.layers:
            self.patched_layer(layer)
        for layer, module in self.layers.items():
            set_scale(module, *scales[layer])

    def patched_layer(self, layer: str) -> ValueProjection:
        """The layer of a name.

        Raises:
            NemoError: there is no value layer of that name, or it is no longer patched.
        """
        if layer not in self.layers:
            raise unknown_layer(layer, self.layers)
        module = self.layers[layer]
        if not isinstance(module, ValueProjection):
            raise NemoError(f"{layer} is not patched: call nemo_ext.patch(pipe) first")
        return module


def patch(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> PatchHandle:
    """Make every neuron of a pipeline switchable, and switch some off: v = (e Wᵀ + bias) · s.

    All value layers are patched. Patching again replaces the neurons and changes nothing else. Without neurons the
    outputs are the untouched pipeline's: bit for bit in eager mode, and up to rounding in compiled graphs. It works
    with any attention processor, `.to()`, autocast, half precision and torch.compile, and `state_dict` keys stay.

    In eager mode without gradients a layer's values are computed once for each text embedding and not at every step;
    see `nemo_ext.patching.value_cache`.

    Args:
        pipe: a diffusers pipeline, or its denoiser.
        neurons: layer name -> neuron indices, a `NeuronSet` for example; None: no neuron.
        scale: the factor s of these neurons; 0 switches them off. All others have 1.

    Returns:
        A handle for changing the neurons later; it may be ignored.

    Raises:
        NemoError: a layer cannot be patched, or a layer or neuron does not exist, by name; then nothing has been
            changed.
    """
    layers = value_layers(pipe, "all")
    scales = neuron_scales(layers, neurons, scale)
    for layer, module in layers.items():
        if "forward" in vars(module):
            raise NemoError(
                f"{layer} has a forward of its own (offloading hooks?), which patching would not "
                "reach: remove the hooks first"
            )
    for layer, module in layers.items():
        set_scale(module, *scales[layer])
    return PatchHandle(layers)


def unpatch(pipe: Any) -> None:
    """Make a pipeline again what it was before `patch`, bit for bit. A pipeline that is not patched stays as it is.

    Args:
        pipe: a diffusers pipeline, or its denoiser.
    """
    for module in denoiser_of(pipe).modules():
        if isinstance(module, ValueProjection):
            remove_scale(module)


def is_patched(pipe: Any) -> bool:
    """Whether the value layers of a pipeline, or of its denoiser, are patched."""
    return any(isinstance(module, ValueProjection) for module in denoiser_of(pipe).modules())


@contextmanager
def patched(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> Iterator[Any]:
    """`patch` for the length of a block. After the block, also after an exception, everything is as before.

    A pipeline that was already patched gets its neurons back.

    Args:
        pipe, neurons, scale: as for `patch`.

    Yields:
        `pipe`.
    """
    with patch_handle(pipe, neurons, scale=scale):
        yield pipe


@contextmanager
def patch_handle(
    pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0
) -> Iterator[PatchHandle]:
    """`patched`, for callers that change the neurons within the block: it yields the handle instead of the pipeline."""
    before = {
        module: (module.neuron_scale.clone(), module.is_unscaled()) if isinstance(module, ValueProjection) else None
        for module in value_layers(pipe, "all").values()
    }
    handle = patch(pipe, neurons, scale=scale)
    try:
        yield handle
    finally:
        for module, state in before.items():
            if state is not None:
                set_scale(module, *state)
            elif isinstance(module, ValueProjection):
                remove_scale(module)


def neuron_scales(
    layers: Mapping[str, nn.Linear], neurons: Mapping[str, Sequence[int]] | None, scale: float
) -> dict[str, tuple[Tensor, bool]]:
    """The scale of each layer with some neurons off: layer name -> (scale [N] float32, whether all of it is 1).

    Raises:
        NemoError: the scale is not finite, or a layer or neuron does not exist, by name.
    """
    if not math.isfinite(scale):
        raise NemoError(f"scale must be a finite number, got {scale}")
    chosen = neurons if isinstance(neurons, NeuronSet) else NeuronSet(neurons)
    chosen.check_layers(layers)
    scales = {layer: torch.ones(module.out_features) for layer, module in layers.items()}
    for layer, indices in chosen.items():
        scales[layer][list(indices)] = scale
    return {layer: (scales[layer], bool((scales[layer] == 1).all())) for layer in layers}
