"""Patching a pipeline, so that its neurons can be switched off (docs/method.md, section 1)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nemo_ext.errors import NemoError
from nemo_ext.models.layers import unknown_layer, value_layers
from nemo_ext.models.registry import denoiser_of
from nemo_ext.models.state import check_unclaimed, claimed
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.guard import guard, unguard
from nemo_ext.patching.value_projection import ValueProjection, remove_scale, set_scale


class PatchHandle:
    """The value layers of a patched pipeline. With it the neurons are changed without a search for the layers.

    Args:
        layers: layer name -> value layer, for all value layers, in network order.
        denoiser: the denoiser that they are part of.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], denoiser: nn.Module) -> None:
        self.layers = dict(layers)
        self._denoiser = denoiser

    def set_neurons(self, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> None:
        """Change which neurons are off. The scales are changed in place, so compiled graphs stay valid.

        Args:
            neurons, scale: as for `patch`.

        Raises:
            NemoError: a layer is no longer patched, a layer or neuron does not exist, the scale is not finite, or
            another
                thread is in a block of `patched` or measures. Then nothing has been changed.
        """
        check_unclaimed(self._denoiser)
        scales = neuron_scales(self.layers, neurons, scale)
        for layer in self.layers:
            self.patched_layer(layer)
        for layer, module in self.layers.items():
            set_scale(module, *scales[layer])

    def patched_layer(self, layer: str) -> ValueProjection:
        """The patched value layer with a given name.

        Raises:
            NemoError: there is no value layer with that name, or it is no longer patched.
        """
        if layer not in self.layers:
            raise unknown_layer(layer, self.layers)
        module = self.layers[layer]
        if not isinstance(module, ValueProjection):
            raise NemoError(f"{layer} is not patched: call nemo_ext.patch(pipe) first")
        return module


def patch(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> PatchHandle:
    """Patch all value layers of a pipeline, and switch some of their neurons off: v = (e Wᵀ + bias) · s.

    This is the first equation of docs/method.md, section 1. Patching a patched pipeline replaces its neurons and
    changes nothing else. While no neuron is off, the outputs are those of the untouched pipeline: bit-identical in
    eager mode, and equal up to rounding in compiled graphs. A patched pipeline works with any attention processor,
    `.to()`, autocast, half precision and torch.compile, and its `state_dict` keys do not change.

    On the CPU, in eager mode without gradients, each layer computes its values once per text embedding and not at every
    step; see `nemo_ext.patching.value_cache`.

    Weights can be averaged, loaded, moved, cast and saved after patching, and a LoRA can be loaded, merged and
    unloaded: neurons that are off stay off, in copies and pickled pipelines too. If a cross-attention no longer uses
    its patched layer, because projections were fused or the layer was replaced, the next call is an error. If the
    pipeline has got another denoiser, or if weights are saved while neurons are off, there is a warning.
    docs/pipelines.md has a table.

    Args:
        pipe: a diffusers pipeline, or its denoiser.
        neurons: layer name -> neuron indices, for example a `NeuronSet`; None: no neuron is switched off.
        scale: the factor s of these neurons, a finite number; 0 switches them off. All other neurons have s = 1.

    Returns:
        A handle with which the neurons can be changed later. The caller may ignore it.

    Raises:
        NemoError: a layer cannot be patched, a layer or neuron does not exist, the scale is not finite, or another
        thread
            is in a block of `patched` or measures. The message names the layer, and nothing has been changed.
    """
    denoiser = denoiser_of(pipe)
    check_unclaimed(denoiser)
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
    guard(pipe, denoiser, layers)
    return PatchHandle(layers, denoiser)


def unpatch(pipe: Any) -> None:
    """Undo `patch`: the pipeline is bit-identical to what it was before. An unpatched pipeline does not change.

    Args:
        pipe: a diffusers pipeline, or its denoiser.

    Raises:
        NemoError: another thread is in a block of `patched` or measures.
    """
    denoiser = denoiser_of(pipe)
    check_unclaimed(denoiser)
    for module in denoiser.modules():
        if isinstance(module, ValueProjection):
            remove_scale(module)
    unguard(pipe, denoiser)


def is_patched(pipe: Any) -> bool:
    """Whether the value layers of a pipeline, or of its denoiser, are patched."""
    return any(isinstance(module, ValueProjection) for module in denoiser_of(pipe).modules())


@contextmanager
def patched(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> Iterator[Any]:
    """Patch a pipeline for the length of a block. After the block, and after an exception, it is as it was before.

    If the pipeline was already patched, the neurons that were off before are off again after the block. Blocks of one
    thread can be nested, and can end in any order; blocks of two threads on one pipeline cannot overlap.

    Args:
        pipe, neurons, scale: as for `patch`.

    Yields:
        `pipe`.

    Raises:
        NemoError: as for `patch`.
    """
    with patch_handle(pipe, neurons, scale=scale):
        yield pipe


@contextmanager
def patch_handle(
    pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0
) -> Iterator[PatchHandle]:
    """Do what `patched` does, and yield the handle, with which the block can change the neurons."""
    denoiser = denoiser_of(pipe)
    with claimed(denoiser):
        block = {
            module: (module.neuron_scale.clone(), module.is_unscaled()) if isinstance(module, ValueProjection) else None
            for module in value_layers(pipe, "all").values()
        }
        handle = patch(pipe, neurons, scale=scale)
        blocks = _blocks.setdefault(denoiser, [])
        blocks.append(block)
        try:
            yield handle
        finally:
            place = next(place for place, other in enumerate(blocks) if other is block)
            if block is blocks[-1]:
                _restore(pipe, denoiser, block)
            else:
                # A block that began later is still open. Its neurons stay off, and at its end it restores what was
                # before this block.
                blocks[place + 1].update(block)
            del blocks[place]


#: What a value layer was before a block: its scale, and whether all elements are 1; None: it was not patched.
_State: TypeAlias = tuple[Tensor, bool] | None
#: The open blocks of each denoiser, in the order in which they began, with the states before them.
_blocks: weakref.WeakKeyDictionary[nn.Module, list[dict[nn.Linear, _State]]] = weakref.WeakKeyDictionary()


def _restore(pipe: Any, denoiser: nn.Module, before: Mapping[nn.Linear, _State]) -> None:
    for module, state in before.items():
        if state is not None:
            set_scale(module, *state)
        elif isinstance(module, ValueProjection):
            remove_scale(module)
    if not any(before.values()):
        unguard(pipe, denoiser)


def neuron_scales(
    layers: Mapping[str, nn.Linear], neurons: Mapping[str, Sequence[int]] | None, scale: float
) -> dict[str, tuple[Tensor, bool]]:
    """The scale of each layer: layer name -> (scale [N] float32 on the CPU, whether all its elements are 1).

    Args:
        layers: layer name -> value layer.
        neurons, scale: as for `patch`.

    Raises:
        NemoError: the scale is not finite, or a layer or neuron does not exist; the message names it.
    """
    if not math.isfinite(scale):
        raise NemoError(f"scale must be a finite number, got {scale}")
    chosen = neurons if isinstance(neurons, NeuronSet) else NeuronSet(neurons)
    chosen.check_layers(layers)
    scales = {
        layer: torch.ones(module.out_features, dtype=torch.float32, device="cpu") for layer, module in layers.items()
    }
    for layer, indices in chosen.items():
        scales[layer][list(indices)] = scale
    return {layer: (scales[layer], bool((scales[layer] == 1).all())) for layer in layers}
