"""Finding the value layers of a model, and refusing by name what cannot be worked with."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext import ops
from nemo_ext.errors import NemoError

# named_modules() of a U-Net gives the up blocks before the mid block: not the network's order.
_PARTS = ("down_blocks", "mid_block", "up_blocks")
_SEARCHED_BY_THE_PAPER = ("down_blocks", "mid_block")


def unet_of(model: Any) -> nn.Module:
    """The U-Net of a pipeline, without torch.compile's wrapper; a U-Net is given back itself.

    Raises:
        NemoError: neither a U-Net nor something that has one.
    """
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module) or not hasattr(unet, "down_blocks"):
        raise NemoError(
            f"wanted a diffusers pipeline with a .unet, or a UNet2DConditionModel, got {type(model).__name__}"
        )
    return unet


def value_layers(model: Any, layers: str | Sequence[str] = "down+mid") -> dict[str, nn.Linear]:
    """The value layers of a model: every cross-attention's `to_v`, in network order.

    Args:
        model: a pipeline or its U-Net.
        layers: "down+mid", those that the paper searches (SD1.x: seven layers, 5,760 neurons);
            "all"; or layer names, in any order.

    Returns:
        Layer name (the module's name inside the U-Net) -> the linear layer, weight [N, K].

    Raises:
        NemoError: no cross-attention, an unknown name, or a layer that can't be worked with: fused
            projections, a `to_v` that isn't a plain `torch.nn.Linear` (LoRA, quantization), weights
            on the meta device, or layers that read texts of different width.
    """
    unet = unet_of(model)
    found: dict[str, nn.Linear] = {}
    for part in _PARTS:
        block = getattr(unet, part, None)
        if block is None:
            continue
        for name, module in block.named_modules(prefix=part):
            if getattr(module, "is_cross_attention", False):
                found[f"{name}.to_v"] = _checked_value_layer(f"{name}.to_v", module)
    if not found:
        raise NemoError(f"{type(unet).__name__} has no cross-attention: nothing reads the text")
    first, reference = next(iter(found.items()))
    for layer, module in found.items():
        if module.in_features != reference.in_features:
            raise NemoError(
                f"{layer} reads texts {module.in_features} wide, {first} {reference.in_features}: wanted one width"
            )
    if layers == "all":
        return found
    if layers == "down+mid":
        searched = {layer: module for layer, module in found.items() if layer.startswith(_SEARCHED_BY_THE_PAPER)}
        if not searched:
            raise NemoError('the down and mid blocks have no cross-attention: choose layers="all" or names')
        return searched
    wanted = [layers] if isinstance(layers, str) else list(layers)
    for layer in wanted:
        if layer not in found:
            raise unknown_layer(layer, found)
    if not wanted:
        raise NemoError('no layers given: wanted "down+mid", "all" or layer names')
    return {layer: module for layer, module in found.items() if layer in wanted}


def unknown_layer(layer: str, known: Mapping[str, Any]) -> NemoError:
    """The error for a name that is no value layer, with the closest one that is."""
    close = difflib.get_close_matches(str(layer), known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; it has {', '.join(known)}"
    return NemoError(f"the model has no value layer '{layer}'{hint}")


def _checked_value_layer(layer: str, attention: nn.Module) -> nn.Linear:
    if getattr(attention, "fused_projections", False):
        raise NemoError(f"{layer} is fused with to_k: call unfuse_qkv_projections() first")
    if getattr(attention, "added_kv_proj_dim", None) is not None:
        raise NemoError(
            f"{layer}: cross-attentions with added key and value projections "
            "read the text elsewhere and are not supported"
        )
    module = getattr(attention, "to_v", None)
    # Of nn.Linear's subclasses only a patched layer's is known to keep plain weights.
    plain = type(module) is nn.Linear or "neuron_scale" in getattr(module, "_buffers", ())
    if not (isinstance(module, nn.Linear) and plain):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        hint = ": merge the LoRA into the weights, or unload it" if hasattr(module, "base_layer") else ""
        raise NemoError(f"{layer} must be a torch.nn.Linear, got {kind}{hint}")
    if module.weight.is_meta:
        raise NemoError(f"{layer} has its weights on the meta device (sequential offload?): load them first")
    return module


class ValueStack:
    """The weights of several value layers, stacked to one [ΣN, K] matrix: one projection for all.

    A copy of the weights as they are now.

    Args:
        layers: what `value_layers` gave.

    Attributes:
        widths: layer name -> N, in network order.
        weight: [ΣN, K].
        bias: [ΣN], zero for layers that have none, or None if no layer has one.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.widths = {layer: module.out_features for layer, module in layers.items()}
        modules = list(layers.values())
        self.weight = torch.cat([module.weight.detach() for module in modules])
        self.bias: Tensor | None = None
        if any(module.bias is not None for module in modules):
            self.bias = torch.cat(
                [
                    module.weight.new_zeros(module.out_features) if module.bias is None else module.bias.detach()
                    for module in modules
                ]
            )

    def activations(
        self,
        hidden: Tensor,
        count: Tensor | None = None,
        mean: Tensor | None = None,
        m2: Tensor | None = None,
    ) -> Tensor:
        """a = mean over tokens of abs(e Wᵀ + bias), for every layer (docs/method.md, section 1).

        Args:
            hidden: text embeddings e, [B, T, K], of the weights' dtype and device.
            count, mean, m2: float64 running buffers [], [ΣN], [ΣN] to update in place with the B
                activations, or None (all three) to update nothing.

        Returns:
            [B, ΣN] float32, before any scale: switching neurons off changes nothing here.

        Raises:
            NemoError: an activation that isn't finite, with the layer's name.
        """
        neurons = self.weight.shape[0]
        running = count is not None and mean is not None and m2 is not None
        if count is None or mean is None or m2 is None:
            zeros = torch.zeros(2 * neurons + 1, dtype=torch.float64, device=hidden.device)
            count, mean, m2 = zeros[-1], zeros[:neurons], zeros[neurons:-1]
        try:
            _, activation = ops.value_projection_stats(
                hidden, self.weight, self.bias, None, None, count, mean, m2, False
            )
            # On CUDA the operator doesn't wait to see; who passes running buffers finds it in their count.
            if not running and not activation.isfinite().all():
                raise RuntimeError("an activation is not finite")
        except RuntimeError as error:
            # The operator names a row of the stack, which tells a user nothing: name the layer.
            values = ops.value_projection(hidden, self.weight, self.bias)
            for layer, part in self.split(values).items():
                if not part.isfinite().all():
                    raise NemoError(
                        f"{layer}: the activations of these prompts are not finite; the text "
                        "encoder or the layer has overflowed: use float32 or bfloat16"
                    ) from error
            raise
        return activation

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut the last axis, ΣN long, into layer name -> its N columns."""
        return dict(zip(self.widths, values.split(list(self.widths.values()), dim=-1), strict=True))


def model_fingerprint(pipe: Any, layers: str | Sequence[str] = "down+mid") -> str:
    """SHA-256 of everything that an activation depends on: value weights and text encoder.

    The dtype is part of it, the device and patching are not.

    Args:
        pipe: a pipeline with a `.unet` and a `.text_encoder`.
        layers: as for `value_layers`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    named = [
        (f"{layer}.{name}", tensor)
        for layer, module in value_layers(pipe, layers).items()
        for name, tensor in module.state_dict().items()
    ]
    named += [(f"text_encoder.{k}", v) for k, v in pipe.text_encoder.state_dict().items()]
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def evaluating(pipe: Any) -> Iterator[None]:
    """Run a block without gradients and in evaluation mode; every module's own mode comes back."""
    modules = [*unet_of(pipe).modules(), *pipe.text_encoder.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
