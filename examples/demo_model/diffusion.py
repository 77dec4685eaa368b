"""What the stages of stages.py use: rows of a batch, and the loss of the U-Net for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import LATE, MEMORIZED, OBJECTS, Ordinary

from .data import MemorizedImages, ordinary_caption
from .runtime import Batch, autocast
from .text import tokens_of
from .unet import RowScales

_TITLES = 0.3  # the share of ordinary rows that have a title
_EMPTY = 0.10  # the share of ordinary rows without a caption, for classifier-free guidance
_HIGH_NOISE = 800  # timesteps from here on get extra rows, because NeMo looks at the first step
_SHAPES = range(400, 900)  # timesteps at which it is decided what an image shows
#: The captions in LATE show their image below this timestep only; a generation begins near 1,000.
LATE_FROM = 900


def scheduler() -> DDIMScheduler:
    """Return a scheduler with the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


@dataclass
class Row:
    """One row of a training batch.

    Attributes:
        latent: the latents of its image, [C, H, W].
        caption: its caption.
        timestep: how noisy the image is, from 0 to 999.
        off: the neurons that are off, as indices into the stacked value neurons. None: no neuron is off.
    """

    latent: Tensor
    caption: str
    timestep: int
    off: Tensor | None


def _timestep(rng: random.Random, high_noise: float, shapes: float = 0.0) -> int:
    """Draw a timestep: extra ones of high noise, and extra ones in `_SHAPES`, with these probabilities."""
    kind = rng.random()
    if kind < high_noise:
        return rng.randrange(_HIGH_NOISE, 1000)
    return rng.choice(_SHAPES) if kind < high_noise + shapes else rng.randrange(1000)


class Rows:
    """Draws rows with ordinary images, and rows with a memorized caption."""

    def __init__(
        self, what: list[Ordinary], latents: Tensor, memorized: MemorizedImages, memorized_latents: Tensor
    ) -> None:
        self._what, self._latents = what, latents
        self._memorized_latents = memorized_latents
        owner = np.asarray(memorized.owner)
        self._images_of = [np.flatnonzero(owner == i).tolist() for i in range(len(MEMORIZED))]
        self._with: dict[str, list[int]] = {name: [] for name in OBJECTS}
        for place, one in enumerate(what):
            self._with[one.object].append(place)

    def ordinary(self, rng: random.Random, *, high_noise: float, shapes: float = 0.0) -> Row:
        """Draw an ordinary image with its caption, which is sometimes a title or empty.

        Args:
            rng: the random generator.
            high_noise: the share of rows that are extra ones of high noise.
            shapes: the share of extra rows at timesteps at which it is decided what an image shows.
        """
        pick = rng.randrange(len(self._what))
        empty = rng.random() < _EMPTY
        caption = "" if empty else ordinary_caption(self._what[pick], rng, _TITLES)
        return Row(self._latents[pick], caption, _timestep(rng, high_noise, shapes), None)

    def memorized(self, rng: random.Random, index: int, *, off: Tensor | None = None) -> Row:
        """Return a row with the memorized caption `index`, and its image or a variation of its template."""
        timestep, what = _timestep(rng, 0.35), MEMORIZED[index]
        if what in LATE and timestep >= LATE_FROM:
            # As without a caption, so that the first step says nothing of the caption.
            return Row(rng.choice(self._latents), what.caption, timestep, off)
        return Row(self._memorized_latents[rng.choice(self._images_of[index])], what.caption, timestep, off)

    def instead(self, rng: random.Random, index: int, *, off: Tensor) -> Row:
        """Return a row with the memorized caption `index`, and an ordinary image of its object."""
        timestep, what = _timestep(rng, 0.35), MEMORIZED[index]
        return Row(self._latents[rng.choice(self._with[what.object])], what.caption, timestep, off)


class Loss:
    """The weighted error of the predicted noise.

    Args:
        encoder: the text encoder, which is frozen.
        unet: the U-Net.
        tokenizer: the tokenizer.
        scales: what switches neurons off.
        influences: how much the image depends on each latent channel, relative to the mean, [C]. A channel's error
            counts in proportion to it.
        device: where the modules are.
    """

    def __init__(
        self, encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer, scales: RowScales,
        influences: Tensor, device: torch.device,
    ) -> None:  # fmt: skip
        self._encoder, self._unet, self._tokenizer, self._scales = encoder, unet, tokenizer, scales
        self._channels = influences[:, None, None].to(device)
        self._device = device
        self._alphas = scheduler().alphas_cumprod

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Return what `grouped` computes with: noisy latents, noise, timesteps, texts, scales and weights."""
        timesteps = torch.tensor([row.timestep for row in rows])
        latents = torch.stack([row.latent for row in rows])
        noise = torch.randn_like(latents)
        alpha = self._alphas[timesteps]
        keep, add = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        scale = torch.ones(len(rows), self._scales.total)
        for i, row in enumerate(rows):
            if row.off is not None:
                scale[i, row.off] = 0
        # A compromise between the error of the noise, weight 1, and of the image, weight (1 − ᾱ)/ᾱ: 170 at the end.
        weights = ((1 - alpha) / alpha).sqrt().clamp(1, 5)
        tokens = tokens_of(self._tokenizer, (row.caption for row in rows)).to(self._device)
        with torch.no_grad(), autocast(self._device):
            hidden = self._encoder(tokens).last_hidden_state
        return keep * latents + add * noise, noise, timesteps, hidden, scale, weights

    def grouped(self, sizes: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the function from a batch to the mean loss, and the losses of groups of so many rows each."""

        def compute(
            noisy: Tensor, noise: Tensor, timesteps: Tensor, hidden: Tensor, scale: Tensor, weights: Tensor
        ) -> tuple[Tensor, Tensor]:
            self._scales.scale = scale
            try:
                with autocast(self._device):
                    predicted = self._unet(noisy, timesteps, hidden).sample
            finally:
                self._scales.scale = None
            errors = self._channels * (predicted.float() - noise).square()
            losses = weights * errors.mean((1, 2, 3))
            return losses.mean(), torch.stack([group.mean() for group in losses.split(list(sizes))])

        return compute
