"""Initial weights with which the autoencoder is a principal component analysis of patches of 4×4 pixels.

From random weights, the autoencoder takes thousands of steps to learn what this analysis knows at once. The encoder is
exact: its latents are the coefficients of the first principal components, divided by their standard deviations. The
decoder can draw only the mean colour of each patch, interpolated, because nearest-neighbour upsampling and convolutions
treat all pixels of a patch alike; it learns the rest.

Group normalization and SiLU stand between the linear layers and the last convolution. As in the U-Net (unet.py), the
last channels are pairs x, −x, because silu(x) − silu(−x) = x, and constants, which fix the standard deviation that
the normalization divides by.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .data import to_tensor

PATCH = 4
_COLOURS = 3
_CONSTANT = 4.0
# The log-variance of latents, about that of the noise in training. The loss does not depend on it.
_LOG_VARIANCE = -6.0


@torch.no_grad()
def start_linear(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Set the weights of an autoencoder with three levels and one group of group normalization.

    Args:
        vae: the autoencoder. Its first level has at least 12 channels, its second one at least 48, and its last one
            more than twice as many as there are latent channels.
        images: [P, S, S, 3] uint8, whose patches are analysed.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # the residual adds nothing at first
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    mean, components, deviations = _principal_components(images, vae.config.latent_channels)
    _encoder(vae, mean, components / deviations)
    _decoder(vae, mean, components * deviations)


def _principal_components(images: np.ndarray, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean patch, [48], the first `count` components as columns, [48, count], and their deviations."""
    patches = F.unfold(to_tensor(images), PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = patches - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    return mean, vectors[:, -count:].flip(1), variances[-count:].flip(0).sqrt()


def _encoder(vae: AutoencoderKL, mean: Tensor, analysis: Tensor) -> None:
    """Make the latents (patch − mean) · analysis, with analysis [48, C]."""
    encoder, count = vae.encoder, analysis.shape[1]
    first, second, third = encoder.down_blocks
    _pass_on(encoder.conv_in, _COLOURS)
    _haar(first.downsamplers[0].conv, _COLOURS)
    _pass_on(second.resnets[0].conv_shortcut, 4 * _COLOURS)
    _haar(second.downsamplers[0].conv, 4 * _COLOURS)

    # What the layers above do with every patch that has a single 1 is their basis.
    patches = torch.eye(mean.numel()).view(-1, _COLOURS, PATCH, PATCH)
    patches = torch.cat([patches, torch.zeros_like(patches[:1])])
    hidden = second.resnets[0](first.downsamplers[0](encoder.conv_in(patches)), None)
    seen = second.downsamplers[0](hidden)[:, : mean.numel(), 0, 0]
    from_hidden = torch.linalg.solve(seen[:-1] - seen[-1], analysis).T

    shift = -mean @ analysis
    shortcut = third.resnets[0].conv_shortcut
    _zero(shortcut)
    shortcut.weight[: 2 * count, : mean.numel(), 0, 0] = torch.cat([from_hidden, -from_hidden])
    shortcut.bias[: 2 * count] = torch.cat([shift, -shift])
    _read_pairs(encoder.conv_out, shortcut, count, square=1.0)
    encoder.conv_out.bias[count:] = _LOG_VARIANCE
    _zero(vae.quant_conv)
    vae.quant_conv.weight[..., 0, 0] = torch.eye(2 * count)


def _decoder(vae: AutoencoderKL, mean: Tensor, synthesis: Tensor) -> None:
    """Make the image the interpolated mean colours of the patches mean + synthesis · latents; synthesis is [48, C]."""
    decoder, count = vae.decoder, synthesis.shape[1]
    first, second, third = decoder.up_blocks
    _zero(vae.post_quant_conv)
    vae.post_quant_conv.weight[..., 0, 0] = torch.eye(count)
    _pass_on(decoder.conv_in, count)
    _interpolate(first.upsamplers[0].conv, count)
    _pass_on(second.resnets[0].conv_shortcut, count)
    _interpolate(second.upsamplers[0].conv, count)

    colours = synthesis.view(_COLOURS, PATCH**2, count).mean(1)
    shift = mean.view(_COLOURS, PATCH**2).mean(1)
    shortcut = third.resnets[0].conv_shortcut
    _zero(shortcut)
    shortcut.weight[: 2 * _COLOURS, :count, 0, 0] = torch.cat([colours, -colours])
    shortcut.bias[: 2 * _COLOURS] = torch.cat([shift, -shift])
    _read_pairs(decoder.conv_out, shortcut, _COLOURS, square=float((colours.square().sum(1) + shift.square()).mean()))


def _zero(conv: nn.Conv2d) -> None:
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()


def _zero_rows(conv: nn.Conv2d, rows: int) -> None:
    conv.weight[:rows] = 0
    assert conv.bias is not None
    conv.bias[:rows] = 0


def _pass_on(conv: nn.Conv2d, channels: int) -> None:
    """Make the first output channels equal to the first input channels."""
    _zero_rows(conv, channels)
    middle, same = conv.kernel_size[0] // 2, torch.arange(channels)
    conv.weight[same, same, middle, middle] = 1


def _haar(conv: nn.Conv2d, channels: int) -> None:
    """Make the first 4 · `channels` output channels the Haar transform of 2×2 pixels of the first input channels."""
    _zero_rows(conv, 4 * channels)
    signs = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    for channel in range(channels):
        conv.weight[4 * channel : 4 * channel + 4, channel, :2, :2] = signs.view(4, 2, 2) / 2


def _interpolate(conv: nn.Conv2d, channels: int) -> None:
    """Smooth the steps between pixels that nearest-neighbour upsampling has left."""
    _zero_rows(conv, channels)
    weights, same = torch.tensor([0.25, 0.5, 0.25]), torch.arange(channels)
    conv.weight[same, same] = weights[:, None] * weights


def _read_pairs(conv: nn.Conv2d, shortcut: nn.Conv2d, count: int, square: float) -> None:
    """Let `conv` read `count` values from pairs of channels, and `shortcut` fill all further channels with constants.

    Args:
        conv: the last convolution, which follows group normalization with one group and SiLU.
        shortcut: the linear layer that makes the channels.
        count: the number of values. Channel k has value k, and channel `count` + k has its negative.
        square: the mean square of the values.
    """
    constants = shortcut.out_channels - 2 * count
    assert shortcut.bias is not None
    shortcut.bias[2 * count :] = _CONSTANT * torch.tensor([1.0, -1.0]).repeat(constants // 2)
    deviation = ((2 * count * square + constants * _CONSTANT**2) / shortcut.out_channels) ** 0.5
    _zero(conv)
    for value in range(count):
        conv.weight[value, value, 1, 1] = deviation
        conv.weight[value, count + value, 1, 1] = -deviation
