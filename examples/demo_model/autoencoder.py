"""The stage `autoencoder`: an AutoencoderKL from 96×96×3 images to 24×24×4 latents of unit standard deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .data import MemorizedImages, to_tensor
from .drawing import IMAGE_SIZE
from .runtime import Average, Log, autocast, cosine, train

_CROP = 48


def build() -> AutoencoderKL:
    """Return the untrained autoencoder."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def _edges(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    """Encode images.

    Args:
        vae: the autoencoder.
        images: [P, S, S, 3] uint8.
        batch: the number of images in one call.

    Returns:
        The means of their latents, [P, 4, 24, 24] float32.
    """
    latents = []
    for start in range(0, len(images), batch):
        with autocast():
            moments = vae.encode(to_tensor(images[start : start + batch])).latent_dist.mean
        latents.append(moments.float())
    return torch.cat(latents)


def cached_latents(path: Path, pool: np.ndarray, vae: AutoencoderKL) -> torch.Tensor:
    """Return the latents of the pool, [P, 4, 24, 24] float32. They are encoded once and then read from `path`."""
    if not path.exists():
        temporary = path.with_suffix(".partial")
        save_file({"latents": encode(vae, pool).half().contiguous()}, temporary)
        temporary.replace(path)
    return load_file(path)["latents"].float()


@torch.no_grad()
def _fold_unit_deviation(vae: AutoencoderKL, sample: np.ndarray) -> dict[str, list[float]]:
    """Scale and shift each latent channel to mean 0 and standard deviation 1, by changing the 1×1 convolutions.

    Otherwise colours would drift, because the noise of the schedule would hide one channel earlier than another.

    Returns:
        The mean and the standard deviation of each channel before the change.
    """
    latents = encode(vae, sample)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    rows = vae.quant_conv.weight[:4]
    rows.div_(std[:, None, None, None])
    vae.quant_conv.bias[:4].sub_(mean).div_(std)
    vae.quant_conv.bias[4:].sub_(2 * std.log())  # the posterior's log-variance is scaled, too
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias.add_((weight[:, :, 0, 0] * mean[None]).sum(1))
    weight.mul_(std[None, :, None, None])
    return {"mean": mean.tolist(), "std": std.tolist()}


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of the autoencoder's output for `images`, [P, S, S, 3]."""
    wanted = to_tensor(images)
    got = vae.decode(vae.encode(wanted).latent_dist.mean).sample.clamp(-1, 1)
    error = ((got - wanted) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def run(folder: Path, log: Log, pool: np.ndarray, memorized: MemorizedImages, steps: int) -> AutoencoderKL:
    """Train the autoencoder, or load it if `folder` has a trained one."""
    vae = build()
    path = folder / "vae"
    if path.exists():
        return AutoencoderKL.from_pretrained(path).eval()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    average = Average(vae, 0.995)
    full_size = int(steps * 0.85)

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng([11, i])
        batch = 16 if i < full_size else 6
        mine = max(1, batch // 6)
        picks = np.sort(rng.choice(len(pool), batch - mine, replace=False))
        images = np.concatenate([pool[picks], memorized.images[_balanced(memorized, rng, mine)]])
        if i < full_size:
            # In these steps the group norms learn the statistics of crops. The last steps, at full size, correct that.
            x, y = rng.integers(0, IMAGE_SIZE - _CROP + 1, 2)
            images = images[:, y : y + _CROP, x : x + _CROP]
        wanted = to_tensor(images)
        with autocast():
            posterior = vae.encode(wanted).latent_dist
            got = vae.decode(posterior.sample()).sample
        got = got.float()
        pixel = F.l1_loss(got, wanted)
        edge = F.l1_loss(_edges(got), _edges(wanted))
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        (pixel + edge + 2e-4 * kl).backward()
        return {"pixel": float(pixel), "edge": float(edge), "kl": float(kl)}

    train("autoencoder", steps, folder / "autoencoder.pt", log, vae, optimizer,
          lambda i: cosine(i, steps, 2e-3), step, average)  # fmt: skip
    vae.load_state_dict(average.state)
    vae.eval()
    sample = np.concatenate([pool[:1500:1], memorized.images])
    log("autoencoder", **_fold_unit_deviation(vae, sample))
    log("autoencoder", psnr_ordinary=psnr(vae, pool[-64:]), psnr_memorized=psnr(vae, memorized.images[:12]))
    vae.save_pretrained(path)
    return vae


def _balanced(memorized: MemorizedImages, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw the indices of `count` memorized images. Every caption is equally likely, whatever its number of images."""
    owner = np.asarray(memorized.owner)
    captions = rng.integers(0, owner.max() + 1, count)
    return np.array([rng.choice(np.flatnonzero(owner == caption)) for caption in captions])
