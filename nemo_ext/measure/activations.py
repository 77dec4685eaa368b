"""Activations: how strongly each neuron of a value layer reacts to a text (docs/method.md, section 1)."""

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
from nemo_ext.torch_state import plain_torch


class ValueStack:
    """A copy of the weights of several value layers as one matrix, so that one operator call projects for all layers.

    Later changes of the layers' weights do not change the copy.

    Args:
        layers: layer name -> value layer, as `value_layers` returns them.

    Attributes:
        widths: layer name -> N, in network order.
        weight: [ΣN, K], in the layers' dtype and on their device.
        bias: [ΣN], with 0 for layers without a bias; None if no layer has a bias.
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
        """Compute a = 1/T · Σ_t |e Wᵀ + b|_t for every layer (docs/method.md, section 1).

        Args:
            hidden: text embeddings e, [B, T, K], in the weights' dtype and on their device.
            count, mean, m2: float64 running buffers [], [ΣN] and [ΣN], which are updated in place with the B
                activations; None for all three updates nothing.

        Returns:
            The activations, [B, ΣN] float32. They are taken before the scale, so neurons that are off have the same
            activation as neurons that are on.

        Raises:
            NemoError: an activation is not finite; the message names the layer. On CUDA this is checked only without
                running buffers, because the check waits for the GPU.
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
            # On CUDA the operator does not check its results, because that would wait for the GPU. With running buffers
            # their count shows the error later (`ActivationStatistics.check_finite`).
            if not running and not activation.isfinite().all():
                raise RuntimeError("an activation is not finite")
        except RuntimeError as error:
            # The operator's message names a neuron of the stack, from which a user cannot tell the layer.
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
        """Split a tensor [..., ΣN] by layer: layer name -> [..., N]."""
        return dict(zip(self.widths, values.split(list(self.widths.values()), dim=-1), strict=True))


@plain_torch()
def prompt_activations(
    pipe: Any, prompts: Sequence[str], layers: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Compute a = 1/T · Σ_t |e Wᵀ + b|_t of every neuron for every prompt (docs/method.md, section 1).

    Args:
        pipe: a pipeline. Neurons that a patch has switched off have the same activation as without the patch.
        prompts: B texts, which are encoded in one batch.
        layers: as for `value_layers`.

    Returns:
        Layer name -> a, [B, N] float32.

    Raises:
        NemoError: an activation is not finite, or as for `encode_prompts` and `value_layers`.
    """
    stack = ValueStack(value_layers(pipe, layers))
    return stack.split(stack.activations(encode_prompts(pipe, prompts).hidden))


def accelerated_linears(text_encoder: nn.Module) -> AbstractContextManager[None]:
    """Run the linear layers of a text encoder on the CPU with `ops.value_projection`, for the length of a block.

    These layers take nearly all of a text encoder's time, and the operator is faster; results change by rounding only.
    Padding tokens are computed like all others, because they contribute to every activation and their embeddings depend
    on the prompt.

    Args:
        text_encoder: the text encoder. Layers on other devices are not changed.
    """
    # Layers with a replaced forward (accelerate's offloading, for example) or with quantized weights are not changed.
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
