"""Activations: how strongly each neuron of the value layers reacts to a text (docs/method.md, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext import ops
from nemo_ext.errors import NemoError
from nemo_ext.forwards import replaced_forwards
from nemo_ext.models.layers import value_layers
from nemo_ext.models.text import encode_prompts


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


def prompt_activations(
    pipe: Any, prompts: Sequence[str], layers: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """a = mean over tokens of abs(e Wᵀ + bias) of every neuron on every prompt (docs/method.md, section 1).

    Args:
        pipe: a pipeline, patched or not: what is switched off changes nothing here.
        prompts: B texts, encoded in one batch.
        layers: as for `value_layers`.

    Returns:
        Layer name -> [B, N] float32.
    """
    stack = ValueStack(value_layers(pipe, layers))
    return stack.split(stack.activations(encode_prompts(pipe, prompts)))


def accelerated_linears(text_encoder: nn.Module) -> AbstractContextManager[None]:
    """Run the linear layers of a text encoder on the CPU through `ops.value_projection`, for the length of a block.

    Results are the same but for rounding, and these layers are nearly all of a text encoder's work. The padding cannot
    be left out of it: padded tokens contribute to every activation, and their embeddings depend on the prompt.
    """
    # A layer that has a forward of its own, such as accelerate's for offloading, or quantized weights is left alone.
    layers = {
        name: module
        for name, module in text_encoder.named_modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and all(map(_is_plain, module.parameters()))
    }

    def project(name: str, _: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        module = layers[name]
        return lambda hidden: ops.value_projection(hidden, module.weight, module.bias)

    return replaced_forwards(layers, project)


def _is_plain(parameter: Tensor) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
