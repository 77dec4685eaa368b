"""The stage `autoencoder`: an AutoencoderKL from 64×64×3 images to 16×16×12 latents of unit standard deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import MemorizedImages, balanced, to_tensor
from .drawing import IMAGE_SIZE
from .linear_start import PATCH, start_linear
from .runtime import Average, Batch, Log, autocast, cosine, train

LATENT_CHANNELS = 12
LATENT_SIZE = IMAGE_SIZE // PATCH
_BATCH, _MEMORIZED = 8, 3  # images in a step, and those among them that are memorized
_EDGES = 2.0  # the weight of differences between neighbouring pixels, whose errors are seen on plain surfaces
# Noise in the latents, relative to a channel's deviation: those that the U-Net makes have errors, too.
_NOISE = 0.05


def build() -> AutoencoderKL:
    """Return the untrained autoencoder."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def _edges(images: Tensor) -> Tensor:
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> Tensor:
    """Encode images.

    Args:
        vae: the autoencoder.
        images: [P, S, S, 3] uint8.
        batch: the number of images in one call.

    Returns:
        The means of their latents, [P, C, S/4, S/4] float32 on the CPU.
    """
    latents = []
    for start in range(0, len(images), batch):
        with autocast(vae.device):
            moments = vae.encode(to_tensor(images[start : start + batch]).to(vae.device)).latent_dist.mean
        latents.append(moments.float().cpu())
    return torch.cat(latents)


def cached_latents(path: Path, pool: np.ndarray, vae: AutoencoderKL) -> Tensor:
    """Return the latents of the pool, [P, C, S/4, S/4] float32. They are encoded once and then read from `path`."""
    if not path.exists():
        temporary = path.with_suffix(".partial")
        save_file({"latents": encode(vae, pool).half().contiguous()}, temporary)
        temporary.replace(path)
    return load_file(path)["latents"].float()


@torch.no_grad()
def _fold_unit_deviation(vae: AutoencoderKL, sample: np.ndarray) -> dict[str, list[float]]:
    """Scale and shift each latent channel to mean 0 and standard deviation 1, by changing the 1×1 convolutions.

    Otherwise the U-Net would have to copy the noise of channels that have less of their own, and colours would drift,
    because the noise of the schedule would hide one channel earlier than another.

    Returns:
        The mean and the standard deviation of each channel before the change.
    """
    latents = encode(vae, sample).to(vae.device)
    c, mean, std = LATENT_CHANNELS, latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.quant_conv.weight[:c].div_(std[:, None, None, None])
    vae.quant_conv.bias[:c].sub_(mean).div_(std)
    vae.quant_conv.bias[c:].sub_(2 * std.log())  # the posterior's log-variance is scaled, too
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias.add_((weight[:, :, 0, 0] * mean[None]).sum(1))
    weight.mul_(std[None, :, None, None])
    return {"mean": mean.tolist(), "std": std.tolist()}


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of the autoencoder's output for `images`, [P, S, S, 3]."""
    wanted = to_tensor(images).to(vae.device)
    got = vae.decode(vae.encode(wanted).latent_dist.mean).sample.clamp(-1, 1)
    error = ((got - wanted) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def run(
    folder: Path, log: Log, pool: np.ndarray, memorized: MemorizedImages, device: torch.device, steps: int
) -> AutoencoderKL:
    """Train the autoencoder, or load it if `folder` has a trained one."""
    path, vae = folder / "vae", build()
    if path.exists():
        # `from_pretrained` would put the path of this folder into the config, and so into the model that is published.
        vae.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"))
        return vae.eval().to(device)
    sample = np.concatenate([pool[:: max(1, len(pool) // 1000)], memorized.images])
    start_linear(vae, sample)
    vae.to(device)
    average = Average(vae, 0.995)

    def batch_of(i: int) -> Batch:
        rng = np.random.default_rng([11, i])
        picks = np.sort(rng.choice(len(pool), _BATCH - _MEMORIZED, replace=False))
        images = np.concatenate([pool[picks], memorized.images[balanced(memorized, rng, _MEMORIZED)]])
        return to_tensor(images), torch.randn(_BATCH, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)

    def compute(wanted: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device):
            latents = vae.encode(wanted).latent_dist.mean
            got = vae.decode(latents + _NOISE * latents.std((0, 2, 3), keepdim=True) * noise).sample
        got = got.float()
        pixel = F.l1_loss(got, wanted)
        edge = F.l1_loss(_edges(got), _edges(wanted))
        return pixel + _EDGES * edge, torch.stack([pixel, edge])

    train("autoencoder", steps, folder / "autoencoder.pt", log, vae, device, lambda i: cosine(i, steps, 2e-3),
          batch_of, compute, ("pixel", "edge"), average)  # fmt: skip
    vae.load_state_dict(average.state)
    vae.eval()
    folded = _fold_unit_deviation(vae, sample)
    log("autoencoder", **folded)
    log("autoencoder", psnr_ordinary=psnr(vae, pool[-64:]), psnr_memorized=psnr(vae, memorized.images))
    vae.save_pretrained(path)
    return vae


@torch.no_grad()
def influences(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return how much the image depends on each latent channel, [C] float32 on the CPU.

    It is the root mean square of what a little noise in this channel changes in the pixels, relative to the mean over
    all channels. The noise is the same in every call.

    Args:
        vae: the autoencoder.
        latents: [B, C, S/4, S/4].
    """
    latents = latents.to(vae.device)
    noise = 0.1 * torch.randn(latents[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(vae.device)
    untouched = vae.decode(latents).sample
    changes = []
    for channel in range(LATENT_CHANNELS):
        touched = latents.clone()
        touched[:, channel] += noise
        changes.append((vae.decode(touched).sample - untouched).square().mean().sqrt())
    change = torch.stack(changes).cpu()
    return change / change.mean()
