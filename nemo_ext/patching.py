"""Switching neurons of a pipeline off and on without hooks: by the class of its value layers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext import ops
from nemo_ext.errors import NemoError
from nemo_ext.layers import unet_of, unknown_layer, value_layers
from nemo_ext.neurons import NeuronSet


class ValueProjection(nn.Linear):
    """A value layer whose neurons can be scaled: v = (e Wᵀ + bias) · s.

    `patch` gives this class to the `torch.nn.Linear` that is already there, so that its parameters,
    `state_dict` keys and hooks stay. The scale s is the buffer `neuron_scale`, [N] float32, not
    part of the `state_dict`; it is only ever changed in place, so compiled graphs stay valid.
    """

    neuron_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """v [B, T, N] of text embeddings e [B, T, K], in e's dtype."""
        return ops.value_projection(input, self.weight, self.bias, self.neuron_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueProjection":
        # .half() and .to(dtype) would round the scale as well: it goes along in device alone.
        scale = self.neuron_scale
        super()._apply(fn, recurse)
        self.neuron_scale = scale.to(self.neuron_scale.device)
        return self


def is_patched(pipe: Any) -> bool:
    """Whether the value layers of a pipeline, or of its U-Net, are patched."""
    return any(isinstance(module, ValueProjection) for module in unet_of(pipe).modules())


def patch(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> None:
    """Make every neuron of a pipeline switchable, and switch some off (v = (e Wᵀ + bias) · s).

    All value layers are patched. Patching again replaces the neurons and changes nothing else. With
    no neurons the outputs are the untouched pipeline's to float rounding. Works under any attention
    processor, `.to()`, autocast, half precision and torch.compile; `state_dict` keys stay.

    Args:
        pipe: a diffusers pipeline, or its U-Net.
        neurons: layer name -> neuron indices, a `NeuronSet` for example; None: none.
        scale: the factor of these neurons; 0 switches them off. All others have 1.

    Raises:
        NemoError: a layer that can't be patched, an unknown layer or neuron, by name; then nothing
            has been changed.
    """
    layers = value_layers(pipe, "all")
    scales = _scales(layers, neurons, scale)
    for layer, module in layers.items():
        if "forward" in vars(module):
            raise NemoError(
                f"{layer} has a forward of its own (offloading hooks?), which patching would not "
                "reach: remove the hooks first"
            )
    for layer, module in layers.items():
        _patch_layer(module, scales[layer])


def set_neurons(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> None:
    """Change which neurons of a patched pipeline are off, in place: nothing is recompiled.

    Args:
        pipe, neurons, scale: as for `patch`.

    Raises:
        NemoError: the pipeline isn't patched, or as for `patch`; then nothing has been changed.
    """
    layers = value_layers(pipe, "all")
    scales = _scales(layers, neurons, scale)
    for layer, module in layers.items():
        _checked_patched(layer, module)
    for layer, module in layers.items():
        _patch_layer(module, scales[layer])


def unpatch(pipe: Any) -> None:
    """Give a pipeline back as it was before `patch`, bit for bit; nothing patched, nothing done.

    Args:
        pipe: a diffusers pipeline, or its U-Net.
    """
    for module in unet_of(pipe).modules():
        if isinstance(module, ValueProjection):
            _unpatch_layer(module)


@contextmanager
def patched(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> Iterator[Any]:
    """`patch` for the length of a block; after it, also after an exception, all is as before.

    "As before" includes a pipeline that was already patched: its neurons come back.

    Args:
        pipe, neurons, scale: as for `patch`.

    Yields:
        `pipe`.
    """
    before = {
        module: module.neuron_scale.clone() if isinstance(module, ValueProjection) else None
        for module in value_layers(pipe, "all").values()
    }
    patch(pipe, neurons, scale=scale)
    try:
        yield pipe
    finally:
        for module, scales in before.items():
            if scales is not None:
                _patch_layer(module, scales)
            elif isinstance(module, ValueProjection):
                _unpatch_layer(module)


@contextmanager
def scaled_rows(pipe: Any, scales: Mapping[str, Tensor]) -> Iterator[Any]:
    """Give value layers a scale for each row of the batch, for the length of a block: many sets of neurons in one call.

    After the block, also after an exception, every layer has the scale that it had before. Each U-Net call in it must
    have B rows. In the next block other tensors of the same shape recompile nothing.

    Args:
        pipe: a patched pipeline, or its U-Net.
        scales: layer name -> [B, N] float32, a row for each row of the batch, the same B everywhere. The tensors are
            used as they are, so a gradient reaches them and a change in place counts. Layers not named keep theirs.

    Yields:
        `pipe`.

    Raises:
        NemoError: an unknown layer, one that isn't patched, or a scale of another shape or dtype, by the layer's name;
            then nothing has been changed.
    """
    layers = value_layers(pipe, "all")
    modules: dict[ValueProjection, Tensor] = {}
    rows = next((len(scale) for scale in scales.values() if scale.dim()), 0)
    for layer, scale in scales.items():
        if layer not in layers:
            raise unknown_layer(layer, layers)
        wanted = [rows, layers[layer].out_features]
        if list(scale.shape) != wanted or scale.dtype != torch.float32:
            raise NemoError(
                f"{layer}: the scale must be [rows, neurons] = {wanted} of torch.float32, "
                f"got {list(scale.shape)} of {scale.dtype}"
            )
        modules[_checked_patched(layer, layers[layer])] = scale
    before = {module: module.neuron_scale for module in modules}
    try:
        for module, scale in modules.items():
            _give_scale(module, scale.to(module.weight.device))
        yield pipe
    finally:
        for module, scale in before.items():
            _give_scale(module, scale)


def _scales(
    layers: Mapping[str, nn.Linear], neurons: Mapping[str, Sequence[int]] | None, scale: float
) -> dict[str, Tensor]:
    if not math.isfinite(scale):
        raise NemoError(f"scale must be a finite number, got {scale}")
    chosen = neurons if isinstance(neurons, NeuronSet) else NeuronSet(neurons)
    chosen.check_layers(layers)
    scales = {layer: torch.ones(module.out_features) for layer, module in layers.items()}
    for layer, indices in chosen.items():
        scales[layer][list(indices)] = scale
    return scales


def _checked_patched(layer: str, module: nn.Linear) -> ValueProjection:
    if not isinstance(module, ValueProjection):
        raise NemoError(f"{layer} is not patched: call nemo_ext.patch(pipe) first")
    return module


def _patch_layer(module: nn.Linear, scale: Tensor) -> None:
    if isinstance(module, ValueProjection):
        module.neuron_scale.copy_(scale)
    else:
        _give_scale(module, scale.to(module.weight.device))


def _give_scale(module: nn.Linear, scale: Tensor) -> None:
    """Make `scale` itself the layer's scale, and the layer a patched one if it isn't."""
    module.register_buffer("neuron_scale", scale, persistent=False)
    module.__class__ = ValueProjection


def _unpatch_layer(module: ValueProjection) -> None:
    del module.neuron_scale
    module.__class__ = nn.Linear  # type: ignore[assignment]
