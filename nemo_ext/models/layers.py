"""Finding the value layers of a model in network order. A layer that is not supported is an error that names it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.models.registry import denoiser_of, family_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def value_layers(model: Any, layers: str | Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The value layers of a model: every cross-attention's `to_v`, in network order.

    Args:
        model: a pipeline or its denoiser.
        layers: the name of a group of layers, or layer names in any order. Every family has the group "all". None: the
            group that the family searches by default; for Stable Diffusion that is "down+mid", the layers that the
            paper searches.

    Returns:
        Layer name (the module's name inside the denoiser) -> the linear layer, weight [N, K].

    Raises:
        NemoError: the model has no cross-attention, a name is unknown, the layers read text embeddings of different
            widths, or a layer is not supported: its projections are fused, `to_v` is not a plain `torch.nn.Linear`
            (LoRA, quantization), or its weights have fewer than 16 bits or are on the meta device.
    """
    denoiser = denoiser_of(model)
    family = family_of(model)
    found = {
        f"{name}.to_v": _checked_value_layer(f"{name}.to_v", attention)
        for name, attention in family.cross_attentions(denoiser)
    }
    if not found:
        raise NemoError(f"{type(denoiser).__name__} has no cross-attention, so none of its layers reads the text")
    first, reference = next(iter(found.items()))
    for layer, module in found.items():
        if module.in_features != reference.in_features:
            raise NemoError(
                f"{layer} reads texts {module.in_features} wide, and {first} texts {reference.in_features} wide: "
                "several widths in one model are not supported"
            )
    groups = {**family.layer_groups(tuple(found)), "all": tuple(found)}
    chosen = family.searched_layers if layers is None else layers
    if isinstance(chosen, str) and chosen in groups:
        wanted: Sequence[str] = groups[chosen]
        if not wanted:
            raise NemoError(
                f'the layers "{chosen}" of this model have no cross-attention: choose layers="all" or names'
            )
    else:
        wanted = [chosen] if isinstance(chosen, str) else list(chosen)
        if not wanted:
            raise NemoError(f"no layers given: wanted {', '.join(map(repr, groups))} or layer names")
    for layer in wanted:
        if layer not in found:
            raise unknown_layer(layer, found)
    return {layer: module for layer, module in found.items() if layer in wanted}


def unknown_layer(layer: str, known: Mapping[str, Any]) -> NemoError:
    """The error for a name that is not a value layer's; its message suggests the most similar name."""
    close = difflib.get_close_matches(str(layer), known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; it has {', '.join(known)}"
    return NemoError(f"the model has no value layer '{layer}'{hint}")


def is_fused(attention: Any) -> bool:
    """Whether a cross-attention projects keys and values in one layer, which leaves `to_v` unused."""
    # Unfusing gives the attention another processor, and leaves the flag.
    processor = type(getattr(attention, "processor", None)).__name__
    return bool(getattr(attention, "fused_projections", False)) and "Fused" in processor


def _checked_value_layer(layer: str, attention: nn.Module) -> nn.Linear:
    if is_fused(attention):
        raise NemoError(f"{layer} is fused with to_k: call unfuse_qkv_projections() first")
    if getattr(attention, "added_kv_proj_dim", None) is not None:
        raise NemoError(
            f"{layer}: cross-attentions with added key and value projections "
            "read the text in other layers too, and are not supported"
        )
    module = getattr(attention, "to_v", None)
    # Subclasses of nn.Linear can store quantized or sharded weights. A patched layer has ordinary ones.
    plain = type(module) is nn.Linear or "neuron_scale" in getattr(module, "_buffers", ())
    if not (isinstance(module, nn.Linear) and plain):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        hint = ""
        if hasattr(module, "base_layer"):
            hint = ": merge the LoRA into the weights (pipe.fuse_lora()), or unload it (pipe.unload_lora_weights())"
            if getattr(module, "merged", False):
                hint = ": its LoRA is merged into the weights, now remove the wrapper with pipe.unload_lora_weights()"
        raise NemoError(f"{layer} must be a torch.nn.Linear, got {kind}{hint}")
    if module.weight.dtype not in _DTYPES:
        raise NemoError(
            f"{layer} stores its weights as {module.weight.dtype} (layerwise casting?): wanted float32, bfloat16 or "
            "float16, so patch and measure the model before its weights are stored like this"
        )
    if module.weight.is_meta:
        raise NemoError(f"{layer} has its weights on the meta device (sequential offload?): load the weights first")
    return module
