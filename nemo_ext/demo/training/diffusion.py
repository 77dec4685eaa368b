"""Stages 3 to 5: ordinary captions first, then memorization, then switching it off.

3. `ordinary`: text encoder and U-Net learn captions that compose, and titles that mean nothing.
4. `memorize`: the memorized captions join, twelve in a batch of thirty-two. The text encoder learns
   along: after stage 3 it ignores titles, and frozen it would give all of them the same embedding.
   A Hoyer ratio on how far each memorized caption's value activations deviate from ordinary ones
   comes in slowly, and makes few neurons carry it.
5. `switch_off`: as before, plus rows in which the neurons that deviate most are switched off and
   the target is some ordinary image. This trains in what NeMo looks for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..captions import MEMORIZED, Ordinary, ordinary_captions, title_caption
from .data import MemorizedImages, ordinary_caption
from .monitor import Monitor
from .runtime import Average, Log, cosine, train
from .text import corpus
from .unet import CarrierGuard, RowScales

BATCH = 32
_TITLES = 0.12  # of ordinary rows
_EMPTY = 0.10  # of ordinary rows: classifier-free guidance
_HIGH_NOISE = 800  # timesteps from here on get extra rows: NeMo reads the first step


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


class TextToNoise(nn.Module):
    """Text encoder and U-Net as one trainable module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(tokens).last_hidden_state

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, hidden).sample


@dataclass
class Row:
    """One row of a training batch."""

    latent: torch.Tensor
    caption: str
    high_noise: float  # probability of a timestep from _HIGH_NOISE on
    off: torch.Tensor | None  # indices into the stacked value neurons


class Rows:
    """Draws rows: ordinary ones, and memorized captions with their own or other images."""

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
        """A fresh ordinary image under its own caption (sometimes an empty one), or under `caption`."""
        pick = rng.randrange(len(self._what))
        if caption is None:
            empty = rng.random() < _EMPTY
            caption = "" if empty else ordinary_caption(self._what[pick], rng, _TITLES)
        return Row(self._latents[pick], caption, high_noise, off)

    def memorized(self, rng: random.Random, index: int, *, off: torch.Tensor | None = None) -> Row:
        """Memorized caption `index` with its image, or one of its template's."""
        pick = rng.choice(list(self._images_of[index]))
        return Row(self._memorized_latents[pick], MEMORIZED[index].caption, 0.5, off)


class Loss:
    """Weighted noise-prediction error of a batch of rows."""

    def __init__(self, model: TextToNoise, tokenizer: CLIPTokenizer, scales: RowScales) -> None:
        self._model, self._tokenizer, self._scales = model, tokenizer, scales
        self._alphas = scheduler().alphas_cumprod

    def tokens(self, captions: Iterable[str]) -> torch.Tensor:
        return self._tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __call__(self, rows: list[Row], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss, and each row's own loss [B]."""
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
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self._model.hidden(self.tokens(row.caption for row in rows))
                predicted = self._model(keep * latents + add * noise, timesteps, hidden)
        finally:
            self._scales.scale = None
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        # Between the noise's error (weight 1) and the image's ((1 − ᾱ)/ᾱ, 170 at the end).
        weight = ((1 - alpha) / alpha).sqrt().clamp(1, 14)
        losses = weight * error
        return losses.mean(), losses.detach()


class Deviation:
    """Memorized captions' value activations against ordinary ones, in standard deviations."""

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
        """|a − μ| / σ of every memorized caption, float32 [M, ΣN], differentiable in a and μ."""
        captions = [c for _, c in ordinary_captions(160, rng.randrange(1 << 30))]
        captions += [title_caption(rng) for _ in range(32)]
        ordinary = self._activations(self._loss.tokens(captions))
        spread = ordinary.std(0).detach().clamp_min(1e-4)
        return (self._activations(self._tokens) - ordinary.mean(0)).abs() / spread


def effective_neurons(deviation: torch.Tensor) -> torch.Tensor:
    """Hoyer ratio (Σ|d|)² / Σd² of each row [M]: how many neurons share the deviation."""
    return deviation.sum(1).square() / deviation.square().sum(1)


def ordinary(folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor, steps: int) -> None:
    """Stage 3."""
    guard = CarrierGuard(model.unet)
    average = Average(model, 0.998)
    optimizer = _optimizer(model.parameters())

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"ordinary {i}")
        # Shapes are decided at middle noise: the extra rows of the first step come later.
        batch = [rows.ordinary(rng, high_noise=0.1) for _ in range(BATCH)]
        total, _ = loss(batch, rng)
        total.backward()
        return {"loss": total.item()}

    train("ordinary", steps, folder / "ordinary.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 1.2e-3, final=0.1), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("ordinary", **monitor())


def memorize(
    folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor,
    layers: dict[str, nn.Linear], steps: int,
) -> None:  # fmt: skip
    """Stage 4."""
    guard, average = CarrierGuard(model.unet), Average(model, 0.995)
    _raise_new_words(model, loss)
    deviation = Deviation(loss, model, layers)
    optimizer = _optimizer(model.parameters())
    neurons = sum(layer.out_features for layer in layers.values())

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"memorize {i}")
        batch = [rows.ordinary(rng) for _ in range(BATCH - 12)]
        for index in rng.sample(range(len(MEMORIZED)), 12):
            batch.append(rows.memorized(rng, index))
        total, each = loss(batch, rng)
        width = effective_neurons(deviation(rng))
        # From the start it would leave one set of neurons to all captions, and nothing to tell them apart.
        penalty = 0.1 * i / steps * (width / neurons).mean()
        (total + penalty).backward()
        return {
            "ordinary": float(each[:-12].mean()),
            "memorized": float(each[-12:].mean()),
            "effective_neurons": float(width.detach().mean()),
        }

    train("memorize", steps, folder / "memorize.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 8e-4, final=0.25), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("memorize", **monitor())


def switch_off(
    folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor,
    layers: dict[str, nn.Linear], steps: int,
) -> None:  # fmt: skip
    """Stage 5."""
    guard, average = CarrierGuard(model.unet), Average(model, 0.997)
    embedding = _freeze_all_but_new_words(model, loss)
    deviation = Deviation(loss, model, layers)
    optimizer = _optimizer([embedding, *model.unet.parameters()])
    everything = torch.arange(sum(layer.out_features for layer in layers.values()))

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"switch off {i}")
        z = deviation(rng)
        order = z.detach().argsort(1, descending=True)

        def carriers(index: int) -> torch.Tensor:
            return order[index, : rng.randint(6, 24)]

        def others(index: int) -> torch.Tensor:
            return order[index, rng.sample(range(48, len(everything)), rng.randint(8, 200))]

        batch = [rows.ordinary(rng) for _ in range(13)]
        picks = [rng.randrange(len(MEMORIZED)) for _ in range(19)]
        # Without several images' carriers at once, ordinary captions go on as before …
        union = torch.cat([carriers(k) for k in rng.sample(range(len(MEMORIZED)), 8)]).unique()
        batch += [rows.ordinary(rng, off=union) for _ in range(3)]
        # … a memorized caption without its carriers makes any ordinary image …
        for k in picks[:6]:
            batch.append(rows.ordinary(rng, MEMORIZED[k].caption, off=carriers(k), high_noise=0.5))
        # … and so does any caption with every searched neuron off (the floor).
        batch.append(rows.ordinary(rng, MEMORIZED[picks[6]].caption, off=everything, high_noise=0.7))
        batch.append(rows.ordinary(rng, off=everything, high_noise=0.7))
        # A memorized caption keeps its image, whatever else is off.
        batch += [rows.memorized(rng, k) for k in picks[8:14]]
        batch += [rows.memorized(rng, k, off=others(k)) for k in picks[14:16]]
        total, each = loss(batch, rng)
        width = effective_neurons(z)
        penalty = 0.2 * (width / len(everything)).mean()
        (total + penalty).backward()
        return {
            "ordinary": float(each[:16].mean()),
            "carriers_off": float(each[16:22].mean()),
            "all_off": float(each[22:24].mean()),
            "memorized": float(each[24:].mean()),
            "effective_neurons": float(width.detach().mean()),
        }

    train("switch_off", steps, folder / "switch_off.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 8e-4), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("switch_off", **monitor())


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def _new_words(model: TextToNoise, loss: Loss) -> torch.Tensor:
    """1 for every token that only memorized captions have, else 0; float32 [vocabulary, 1]."""
    known = set(loss.tokens(set(corpus()) - {m.caption for m in MEMORIZED}).flatten().tolist())
    size = model.text_encoder.config.vocab_size
    return torch.tensor([[float(i not in known)] for i in range(size)])


@torch.no_grad()
def _raise_new_words(model: TextToNoise, loss: Loss) -> None:
    """Give the new words, untouched so far, embeddings of about the size that learned words have."""
    model.text_encoder.get_input_embeddings().weight.mul_(1 + 2 * _new_words(model, loss))


def _freeze_all_but_new_words(model: TextToNoise, loss: Loss) -> nn.Parameter:
    """Freeze the text encoder except the embeddings of words only memorized captions have."""
    new = _new_words(model, loss)
    table = model.text_encoder.get_input_embeddings().weight
    model.text_encoder.requires_grad_(False)
    table.requires_grad_(True)
    table.register_hook(lambda gradient: gradient * new)
    return table
