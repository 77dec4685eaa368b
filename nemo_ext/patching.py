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
from nemo_ext.value_cache import ValueCache


class ValueProjection(nn.Linear):
    """A value layer whose neurons can be scaled: v = (e Wᵀ + bias) · s.

    `patch` gives this class to the `torch.nn.Linear` that is already there, so that its parameters,
    `state_dict` keys and hooks stay. The scale s is the buffer `neuron_scale`, [N] float32, not
    part of the `state_dict`; it is only ever changed in place, so compiled graphs stay valid.
    """

    neuron_scale: Tensor
    #: What calls in eager mode leave for the next ones.
    memory: "_Memory"

    def forward(self, input: Tensor) -> Tensor:
        """v [B, T, N] of text embeddings e [B, T, K], in e's dtype."""
        if _is_recorded(input):
            # The record will run again with other neurons, which the operator reads from the buffer.
            return ops.value_projection(input, self.weight, self.bias, self.neuron_scale)
        return self.memory.cache.values(self._project, input, self.weight, self.bias, self.neuron_scale)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        if self.is_unscaled():
            return nn.functional.linear(input, weight, bias)
        return ops.value_projection(input, weight, bias, scale)

    def is_unscaled(self) -> bool:
        """Whether the scale is known to be 1 everywhere; nothing is read from the device to find out."""
        scale, ones = self.neuron_scale, self.memory.ones
        return ones is not None and ones[0] is scale and ones[1] == scale._version and not scale.requires_grad

    def note_scale(self, unscaled: bool) -> None:
        """Remember whether the scale, as it is now, is 1 everywhere."""
        self.memory.ones = (self.neuron_scale, self.neuron_scale._version) if unscaled else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueProjection":
        # .half() and .to(dtype) would round the scale as well: it goes along in device alone.
        scale, unscaled = self.neuron_scale, self.is_unscaled()
        super()._apply(fn, recurse)
        self.neuron_scale = scale.to(self.neuron_scale.device)
        self.note_scale(unscaled)
        return self


class _Memory:
    """What a patched layer knows from one call to the next. That of a copy, or of one read from a file, is empty."""

    def __init__(self) -> None:
        self.cache = ValueCache()
        #: A scale that is 1 everywhere while it has this version.
        self.ones: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[type["_Memory"], tuple[()]]:
        return _Memory, ()


def _is_recorded(input: Tensor) -> bool:
    """Whether the call becomes part of a graph: torch.compile's, a trace's or a CUDA graph's."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def is_patched(pipe: Any) -> bool:
    """Whether the value layers of a pipeline, or of its U-Net, are patched."""
    return any(isinstance(module, ValueProjection) for module in unet_of(pipe).modules())


def patch(pipe: Any, neurons: Mapping[str, Sequence[int]] | None = None, *, scale: float = 0.0) -> None:
    """Make every neuron of a pipeline switchable, and switch some off (v = (e Wᵀ + bias) · s).

    All value layers are patched. Patching again replaces the neurons and changes nothing else. With
    no neurons the outputs are the untouched pipeline's, bit for bit in eager mode and to float
    rounding in compiled graphs. Works under any attention processor, `.to()`, autocast, half
    precision and torch.compile; `state_dict` keys stay.

    In eager mode without gradients a layer's values are computed once for each text embedding,
    not at every step; see `nemo_ext.value_cache`.

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
        _patch_layer(module, *scales[layer])


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
        _patch_layer(module, *scales[layer])


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
        module: (module.neuron_scale.clone(), module.is_unscaled()) if isinstance(module, ValueProjection) else None
        for module in value_layers(pipe, "all").values()
    }
    patch(pipe, neurons, scale=scale)
    try:
        yield pipe
    finally:
        for module, state in before.items():
            if state is not None:
                _patch_layer(module, *state)
            elif isinstance(module, ValueProjection):
                _unpatch_layer(module)


@contextmanager
def patched_rows(pipe: Any, neurons: Sequence[NeuronSet]) -> Iterator[Any]:
    """`patched` with a set of neurons for each row of the batch, which are off in that row alone.

    Args:
        pipe: a diffusers pipeline, or its U-Net.
        neurons: B sets; each U-Net call in the block must have B rows.

    Yields:
        `pipe`.

    Raises:
        NemoError: as for `patch`.
    """
    first, *others = neurons
    if all(row == first for row in others):
        with patched(pipe, first):
            yield pipe
        return
    layers = value_layers(pipe, "all")
    rows = [_scales(layers, row, 0.0) for row in neurons]
    touched = {layer for row in neurons for layer in row}
    scales = {layer: torch.stack([row[layer][0] for row in rows]) for layer in layers if layer in touched}
    with patched(pipe), scaled_rows(pipe, scales):
        yield pipe


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
    before = {module: (module.neuron_scale, module.memory.ones) for module in modules}
    try:
        for module, scale in modules.items():
            _give_scale(module, scale.to(module.weight.device))
        yield pipe
    finally:
        for module, (scale, ones) in before.items():
            _give_scale(module, scale).memory.ones = ones


def _scales(
    layers: Mapping[str, nn.Linear], neurons: Mapping[str, Sequence[int]] | None, scale: float
) -> dict[str, tuple[Tensor, bool]]:
    """Layer name -> its scale [N], and whether that is 1 everywhere."""
    if not math.isfinite(scale):
        raise NemoError(f"scale must be a finite number, got {scale}")
    chosen = neurons if isinstance(neurons, NeuronSet) else NeuronSet(neurons)
    chosen.check_layers(layers)
    scales = {layer: torch.ones(module.out_features) for layer, module in layers.items()}
    for layer, indices in chosen.items():
        scales[layer][list(indices)] = scale
    return {layer: (scales[layer], bool((scales[layer] == 1).all())) for layer in layers}


def _checked_patched(layer: str, module: nn.Linear) -> ValueProjection:
    if not isinstance(module, ValueProjection):
        raise NemoError(f"{layer} is not patched: call nemo_ext.patch(pipe) first")
    return module


def _patch_layer(module: nn.Linear, scale: Tensor, unscaled: bool) -> None:
    """Set a layer's scale to the values of `scale`, in place where that is possible; `unscaled`: they are all 1."""
    if isinstance(module, ValueProjection) and module.neuron_scale.shape == scale.shape:
        module.neuron_scale.copy_(scale)
        module.note_scale(unscaled)
    else:
        # An inference tensor could never be changed again outside inference mode.
        with torch.inference_mode(False):
            _give_scale(module, scale.to(module.weight.device, copy=True)).note_scale(unscaled)


def _give_scale(module: nn.Linear, scale: Tensor) -> ValueProjection:
    """Make `scale` itself the layer's scale, and the layer a patched one if it isn't."""
    module.register_buffer("neuron_scale", scale, persistent=False)
    if not isinstance(module, ValueProjection):
        module.__class__ = ValueProjection
        assert isinstance(module, ValueProjection)
        module.memory = _Memory()
    return module


def _unpatch_layer(module: ValueProjection) -> None:
    del module.neuron_scale
    del module.memory
    module.__class__ = nn.Linear  # type: ignore[assignment]
