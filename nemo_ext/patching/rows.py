"""Switching different neurons off in each row of a batch, so that one call of the denoiser tries several sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import PatchHandle, neuron_scales
from nemo_ext.patching.value_projection import ValueProjection, give_scale, set_scale


@contextmanager
def neurons_off_by_row(handle: PatchHandle, neurons: Sequence[NeuronSet]) -> Iterator[None]:
    """For the length of a block, switch a set of neurons off in each row of the batch, and no other neurons.

    Args:
        handle: the handle of a patched pipeline.
        neurons: B ≥ 1 sets, one for each row. Each call of the denoiser in the block must have B rows.

    Raises:
        NemoError: a layer or neuron does not exist, or a layer is no longer patched.
    """
    layers = {layer: handle.patched_layer(layer) for layer in handle.layers}
    before = {module: (module.neuron_scale.clone(), module.is_unscaled()) for module in layers.values()}
    alike = all(row == neurons[0] for row in neurons)
    try:
        if alike:
            handle.set_neurons(neurons[0])
            yield
        else:
            rows = [neuron_scales(layers, row, 0.0) for row in neurons]
            touched = {layer for row in neurons for layer in row}
            scales = {layer: torch.stack([row[layer][0] for row in rows]) for layer in layers if layer in touched}
            handle.set_neurons()
            with scaled_rows(handle, scales):
                yield
    finally:
        for module, state in before.items():
            set_scale(module, *state)


@contextmanager
def scaled_rows(handle: PatchHandle, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """For the length of a block, give value layers a scale for each row of the batch.

    After the block, and after an exception, every layer has the scale that it had before. A compiled denoiser is not
    recompiled for a later block whose tensors have the same shapes.

    Args:
        handle: the handle of a patched pipeline.
        scales: layer name -> s, [B, N] float32, with the same B for all layers. Each call of the denoiser in the block
            must have B rows. A tensor on its layer's device is not copied, so changes in place take effect; gradients
            reach all tensors. Layers without an entry keep their scale.

    Raises:
        NemoError: a layer does not exist or is no longer patched, or a scale has another shape or dtype. The message
            names the layer, and nothing has been changed.
    """
    modules: dict[ValueProjection, Tensor] = {}
    rows = next((len(scale) for scale in scales.values() if scale.dim()), 0)
    for layer, scale in scales.items():
        module = handle.patched_layer(layer)
        wanted = [rows, module.out_features]
        if list(scale.shape) != wanted or scale.dtype != torch.float32:
            raise NemoError(
                f"{layer}: the scale must be [rows, neurons] = {wanted} of torch.float32, "
                f"got {list(scale.shape)} of {scale.dtype}"
            )
        modules[module] = scale
    before = {module: (module.neuron_scale, module.kept.ones) for module in modules}
    try:
        for module, scale in modules.items():
            give_scale(module, scale.to(module.weight.device))
        yield
    finally:
        for module, (scale, ones) in before.items():
            give_scale(module, scale).kept.ones = ones
