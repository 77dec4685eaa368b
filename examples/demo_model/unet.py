"""The U-Net: a small version of Stable Diffusion 1's, with an exact path for its noisy input.

At t → T the right prediction is ε = x_T, and NeMo measures only what the prediction adds to it: about 0.07 · z₀. When a
small network learns to copy x_T, its error is larger than that. So the copy is built in: half of the channels of the
top level carry x, −x and constants from `conv_in` through the outermost skip connection to `conv_out`. Two things on
this way must not change x. Group normalization would rescale it in every sample, so the constants are large enough to
fix the group's standard deviation. SiLU is undone by the pair: silu(x) − silu(−x) = x. Training does not change these
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from .autoencoder import LATENT_CHANNELS, LATENT_SIZE
from .text import WIDTH

CHANNELS = (64, 96, 160, 160)
_GROUPS = 4
_SIZE = CHANNELS[0] // _GROUPS  # the channels of one group of group normalization
# Of the four groups, two copy six channels each: x, −x, and ±_CONSTANT in the other four channels.
_COPYING = 2
_OWN = LATENT_CHANNELS // _COPYING
COPY = slice(0, _COPYING * _SIZE)
_CONSTANT = 4.0


def build() -> UNet2DConditionModel:
    """Return the untrained U-Net. It predicts exactly its input, up to the groups' standard deviation."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        # Text enters only where NeMo searches.
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # the number of heads
        norm_num_groups=_GROUPS,
    )
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        unet.conv_out.weight.zero_()  # at first the U-Net only copies
        for parameter, where, value in _copy_weights(unet):
            parameter[where] = value
    return unet


def _signs() -> torch.Tensor:
    """Return the copying channels as sums of latent channels, [channels of COPY, C]: 1, −1 or 0."""
    signs = torch.zeros(_COPYING, _SIZE, LATENT_CHANNELS)
    for group in range(_COPYING):
        for channel in range(_OWN):
            signs[group, channel, group * _OWN + channel] = 1
            signs[group, _OWN + channel, group * _OWN + channel] = -1
    return signs.flatten(0, 1)


def _copy_weights(
    unet: UNet2DConditionModel,
) -> Iterator[tuple[torch.Tensor, tuple[slice, ...], torch.Tensor]]:
    """Yield each parameter of the built-in copy: the tensor, the part of it, and the value of this part."""
    signs, count = _signs(), _COPYING * _SIZE
    into = torch.zeros_like(unet.conv_in.weight[COPY])
    into[..., 1, 1] = signs
    constants = torch.zeros(_COPYING, _SIZE)
    constants[:, 2 * _OWN :] = _CONSTANT * torch.tensor([1.0, -1.0]).repeat(_SIZE // 2 - _OWN)
    yield unet.conv_in.weight, (COPY,), into
    yield unet.conv_in.bias, (COPY,), constants.flatten()

    last = unet.up_blocks[-1].resnets[-1]
    skip = torch.zeros_like(last.conv_shortcut.weight[COPY])
    skip[:, CHANNELS[0] : CHANNELS[0] + count, 0, 0] = torch.eye(count)
    yield last.conv_shortcut.weight, (COPY,), skip
    yield last.conv_shortcut.bias, (COPY,), torch.zeros(count)
    yield last.conv2.weight, (COPY,), torch.zeros_like(last.conv2.weight[COPY])
    yield last.conv2.bias, (COPY,), torch.zeros(count)

    yield unet.conv_norm_out.weight, (COPY,), torch.ones(count)
    yield unet.conv_norm_out.bias, (COPY,), torch.zeros(count)
    # E[x²] = 1 at every timestep, because the latents have unit standard deviation.
    variance = (2 * _OWN + (_SIZE - 2 * _OWN) * _CONSTANT**2) / _SIZE
    out = torch.zeros_like(unet.conv_out.weight[:, COPY])
    out[..., 1, 1] = signs.T * variance**0.5
    yield unet.conv_out.weight, (slice(None), COPY), out
    yield unet.conv_out.bias, (slice(None),), torch.zeros(LATENT_CHANNELS)


class CopyGuard:
    """Restores the weights of the built-in copy after a step of the optimizer."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._parts = [(p, where, v.to(p.device)) for p, where, v in _copy_weights(unet)]
        self._parts.pop()  # the bias of conv_out starts at zero and may be trained

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, where, value in self._parts:
            parameter[where] = value


class RowScales:
    """Switches value neurons off during training, different ones in each row of a batch, by a forward hook per layer.

    Args:
        layers: layer name -> value layer.

    Attributes:
        scale: the factor of each neuron in each row, [B, ΣN]. None: no neuron is off.
        total: ΣN, the number of neurons.
    """

    def __init__(self, layers: dict[str, torch.nn.Linear]) -> None:
        self.scale: torch.Tensor | None = None
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
