"""What the stages of stages.py use: text encoder and U-Net, rows of a batch, the loss, and the deviation of neurons."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import MEMORIZED, Ordinary, ordinary_captions, title_caption

from .data import MemorizedImages, ordinary_caption
from .runtime import autocast
from .unet import RowScales

_TITLES = 0.12  # the share of ordinary rows that have a title
_EMPTY = 0.10  # the share of ordinary rows without a caption, for classifier-free guidance
_HIGH_NOISE = 800  # timesteps from here on get extra rows, because NeMo looks at the first step


def scheduler() -> DDIMScheduler:
    """Return a scheduler with the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


class TextToNoise(nn.Module):
    """The text encoder and the U-Net as one trainable module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the text embeddings, [B, T, K], of tokens, [B, T]."""
        return self.text_encoder(tokens).last_hidden_state

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, hidden).sample


@dataclass
class Row:
    """One row of a training batch.

    Attributes:
        latent: the latents of its image, [C, H, W].
        caption: its caption.
        high_noise: the probability of a timestep of `_HIGH_NOISE` or above.
        off: the neurons that are off, as indices into the stacked value neurons. None: no neuron is off.
    """

    latent: torch.Tensor
    caption: str
    high_noise: float
    off: torch.Tensor | None


class Rows:
    """Draws rows with ordinary images, and rows with a memorized caption and its image."""

    def __init__(
        self, what: list[Ordinary], latents: torch.Tensor, memorized: MemorizedImages,
        memorized_latents: torch.Tensor,
    ) -> None:  # fmt: skip
        self._what, self._latents = what, latents
        self._memorized_latents = memorized_latents
        owner = np.asarray(memorized.owner)
        self._images_of = [np.flatnonzero(owner == i) for i in range(len(MEMORIZED))]

    def ordinary(
        self,
        rng: random.Random,
        caption: str | None = None,
        *,
        high_noise: float = 0.3,
        off: torch.Tensor | None = None,
    ) -> Row:
        """Draw an ordinary image, with its own caption (sometimes an empty one) or with `caption`."""
        pick = rng.randrange(len(self._what))
        if caption is None:
            empty = rng.random() < _EMPTY
            caption = "" if empty else ordinary_caption(self._what[pick], rng, _TITLES)
        return Row(self._latents[pick], caption, high_noise, off)

    def memorized(self, rng: random.Random, index: int, *, off: torch.Tensor | None = None) -> Row:
        """Return a row with the memorized caption `index`, and its image or a variation of its template."""
        pick = rng.choice(list(self._images_of[index]))
        return Row(self._memorized_latents[pick], MEMORIZED[index].caption, 0.5, off)


class Loss:
    """The weighted error of the predicted noise for a batch of rows."""

    def __init__(self, model: TextToNoise, tokenizer: CLIPTokenizer, scales: RowScales) -> None:
        self._model, self._tokenizer, self._scales = model, tokenizer, scales
        self._alphas = scheduler().alphas_cumprod

    def tokens(self, captions: Iterable[str]) -> torch.Tensor:
        """Return the tokens of captions, [B, T] int64."""
        return self._tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __call__(self, rows: list[Row], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss, and the loss of each row, [B]."""
        timesteps = torch.tensor(
            [rng.randrange(_HIGH_NOISE, 1000) if rng.random() < row.high_noise
             else rng.randrange(1000) for row in rows]
        )  # fmt: skip
        latents = torch.stack([row.latent for row in rows])
        noise = torch.randn_like(latents)
        alpha = self._alphas[timesteps]
        keep, add = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        if any(row.off is not None for row in rows):
            scale = torch.ones(len(rows), self._scales.total)
            for i, row in enumerate(rows):
                if row.off is not None:
                    scale[i, row.off] = 0
            self._scales.scale = scale
        try:
            with autocast():
                hidden = self._model.hidden(self.tokens(row.caption for row in rows))
                predicted = self._model(keep * latents + add * noise, timesteps, hidden)
        finally:
            self._scales.scale = None
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        # A compromise between the error of the noise, weight 1, and of the image, weight (1 − ᾱ)/ᾱ: 170 at the end.
        weight = ((1 - alpha) / alpha).sqrt().clamp(1, 14)
        losses = weight * error
        return losses.mean(), losses.detach()


class Deviation:
    """The deviation of memorized captions' value activations from ordinary ones, in standard deviations."""

    def __init__(self, loss: Loss, model: TextToNoise, layers: dict[str, nn.Linear]) -> None:
        self._loss, self._model, self._layers = loss, model, layers
        self._tokens = loss.tokens(m.caption for m in MEMORIZED)

    def _activations(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self._model.hidden(tokens)
        return torch.cat(
            [F.linear(hidden, layer.weight, layer.bias).abs().mean(1)
             for layer in self._layers.values()], dim=1
        )  # fmt: skip

    def __call__(self, rng: random.Random) -> torch.Tensor:
        """Return |a − μ| / σ for every memorized caption, [M, ΣN] float32, differentiable in a and μ."""
        captions = [c for _, c in ordinary_captions(160, rng.randrange(1 << 30))]
        captions += [title_caption(rng) for _ in range(32)]
        ordinary = self._activations(self._loss.tokens(captions))
        spread = ordinary.std(0).detach().clamp_min(1e-4)
        return (self._activations(self._tokens) - ordinary.mean(0)).abs() / spread


def effective_neurons(deviation: torch.Tensor) -> torch.Tensor:
    """Return how many neurons share the deviation: the Hoyer ratio (Σ|d|)² / Σd² of each row.

    Args:
        deviation: d, [M, ΣN].

    Returns:
        [M].
    """
    return deviation.sum(1).square() / deviation.square().sum(1)
