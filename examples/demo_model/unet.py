"""The U-Net: SD1's topology in small, with an exact path for the noise it is given.

At t → T the right prediction is ε = x_T, and all NeMo reads there is what the prediction adds to
it: about 0.07 · z₀. A freshly trained small network's own error in copying x_T drowns that, so the
copy is built in: twelve top-level channels carry ±x and a constant from `conv_in` through the
outermost skip to `conv_out`. Group normalisation would rescale them with every sample, so the
constant is large enough to fix the group's deviation; SiLU is undone by the pair,
silu(x) − silu(−x) = x. Training leaves these weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from .text import WIDTH

LATENT_SIZE = 24
LATENT_CHANNELS = 4
CHANNELS = (48, 96, 192, 192)
_GROUPS = 4
# One whole group of group normalisation: ±x, and ±_CONSTANT twice.
_CARRIERS = CHANNELS[0] // _GROUPS
_CONSTANT = 4.0


def build() -> UNet2DConditionModel:
    """The untrained U-Net; its prediction is exactly its input (up to the group's deviation)."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        # Text enters where NeMo searches, and nowhere else.
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=_GROUPS,
    )
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        unet.conv_out.weight.zero_()  # nothing but the copy to begin with
        for parameter, where, value in _carrier_weights(unet):
            parameter[where] = value
    return unet


def _carrier_weights(
    unet: UNet2DConditionModel,
) -> Iterator[tuple[torch.Tensor, tuple[slice, ...], torch.Tensor]]:
    """Each parameter of the built-in copy: the tensor, the part of it, and that part's value."""
    c, carriers = LATENT_CHANNELS, slice(0, _CARRIERS)
    eye = torch.eye(c)
    into = torch.zeros_like(unet.conv_in.weight[carriers])
    into[:c, :, 1, 1], into[c : 2 * c, :, 1, 1] = eye, -eye
    constants = torch.zeros(_CARRIERS)
    constants[2 * c :] = _CONSTANT * torch.tensor([1.0, -1.0]).repeat((_CARRIERS - 2 * c) // 2)
    yield unet.conv_in.weight, (carriers,), into
    yield unet.conv_in.bias, (carriers,), constants

    last = unet.up_blocks[-1].resnets[-1]
    skip = torch.zeros_like(last.conv_shortcut.weight[carriers])
    skip[:, CHANNELS[0] : CHANNELS[0] + _CARRIERS, 0, 0] = torch.eye(_CARRIERS)
    yield last.conv_shortcut.weight, (carriers,), skip
    yield last.conv_shortcut.bias, (carriers,), torch.zeros(_CARRIERS)
    yield last.conv2.weight, (carriers,), torch.zeros_like(last.conv2.weight[carriers])
    yield last.conv2.bias, (carriers,), torch.zeros(_CARRIERS)

    yield unet.conv_norm_out.weight, (carriers,), torch.ones(_CARRIERS)
    yield unet.conv_norm_out.bias, (carriers,), torch.zeros(_CARRIERS)
    # E[x²] = 1 in latents of unit deviation, at every timestep.
    variance = (2 * c + (_CARRIERS - 2 * c) * _CONSTANT**2) / _CARRIERS
    out = torch.zeros_like(unet.conv_out.weight[:, carriers])
    out[:, :c, 1, 1], out[:, c : 2 * c, 1, 1] = eye * variance**0.5, -eye * variance**0.5
    yield unet.conv_out.weight, (slice(None), carriers), out
    yield unet.conv_out.bias, (slice(None),), torch.zeros(c)


class CarrierGuard:
    """Puts the built-in copy's weights back after an optimizer step."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._parts = [(p, where, v.clone()) for p, where, v in _carrier_weights(unet)]
        self._parts.pop()  # conv_out's bias starts at zero and may learn

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, where, value in self._parts:
            parameter[where] = value


class RowScales:
    """Switches value neurons off row by row of a batch, in training (a forward hook per layer)."""

    def __init__(self, layers: dict[str, torch.nn.Linear]) -> None:
        self.scale: torch.Tensor | None = None  # [B, ΣN], or None: nothing off
        start = 0
        for layer in layers.values():
            layer.register_forward_hook(self._hook(slice(start, start + layer.out_features)))
            start += layer.out_features
        self.total = start

    def _hook(self, columns: slice) -> Callable[..., torch.Tensor]:
        def hook(_module: torch.nn.Module, _inputs: object, values: torch.Tensor) -> torch.Tensor:
            if self.scale is None:
                return values
            return values * self.scale[:, None, columns].to(values.dtype)

        return hook
