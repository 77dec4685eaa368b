"""What is logged after a training stage: whether captions matter, scores, τ, and what neurons that are off leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import LATE, MEMORIZED, ordinary_captions
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity
from nemo_ext.measure.threshold import mean_and_std

from .autoencoder import LATENT_CHANNELS, LATENT_SIZE
from .diffusion import scheduler
from .text import tokens_of
from .unet import RowScales

_SEEDS = 6
_TIMESTEP = 981  # the first of a 50-step DDIM schedule
_ORDINARY = 32
_MIDDLE = 700  # a timestep at which shapes and colours are decided


class Monitor:
    """Measures first-step scores during training.

    Args:
        encoder, unet, tokenizer: the model.
        scales: what switches neurons off.
        carriers: the carriers of each memorized caption, as indices into the stacked value neurons.
        latents: the latents of some ordinary images, [B, C, H, W].
        captions: their captions. No image may have the caption of the one before it.
    """

    def __init__(
        self, encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer, scales: RowScales,
        carriers: Sequence[Tensor], latents: Tensor, captions: Sequence[str],
    ) -> None:  # fmt: skip
        self._encoder, self._unet, self._tokenizer, self._scales = encoder, unet, tokenizer, scales
        self._carriers, self._latents, self._captions = carriers, latents, captions
        self._protocol = Protocol.paper()

    @torch.no_grad()
    def _differences(self, caption: str, off: Tensor) -> Tensor:
        device = self._unet.device
        latents = torch.randn(
            _SEEDS, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE,
            generator=torch.Generator().manual_seed(5),
        ).to(device)  # fmt: skip
        hidden = self._encoder(tokens_of(self._tokenizer, [caption]).to(device)).last_hidden_state
        scale = torch.ones(_SEEDS, self._scales.total, device=device)
        scale[:, off.to(device)] = 0
        self._scales.scale = scale
        try:
            noise = self._unet(latents, _TIMESTEP, hidden.expand(_SEEDS, -1, -1)).sample
        finally:
            self._scales.scale = None
        difference = (noise - latents).cpu()
        low = difference.amin((2, 3), keepdim=True)
        return (difference - low) / (difference.amax((2, 3), keepdim=True) - low)

    @torch.no_grad()
    def _caption_gain(self) -> float:
        """Return the share of the error that the right caption saves, compared with the caption of another image.

        Zero says that the U-Net has learned no text.
        """
        device = self._unet.device
        noise = torch.randn(self._latents.shape, generator=torch.Generator().manual_seed(6))
        alpha = scheduler().alphas_cumprod[_MIDDLE]
        noisy = (alpha.sqrt() * self._latents + (1 - alpha).sqrt() * noise).to(device)
        hidden = self._encoder(tokens_of(self._tokenizer, self._captions).to(device)).last_hidden_state
        errors = [
            (self._unet(noisy, _MIDDLE, text).sample.cpu() - noise).square().mean()
            for text in (hidden, hidden.roll(1, 0))
        ]
        return float(1 - errors[0] / errors[1])

    def _score(self, maps: Tensor) -> float:
        first, second = torch.triu_indices(_SEEDS, _SEEDS, 1)
        return float(similarity(maps[first], maps[second], self._protocol).max())

    def __call__(self) -> dict[str, float]:
        """Return the figures: name -> value. The last ones are with neurons off, as medians over captions."""
        nothing = torch.tensor([], dtype=torch.int64)
        everything = torch.arange(self._scales.total)
        ordinary = [self._score(self._differences(c, nothing)) for _, c in ordinary_captions(_ORDINARY, seed=1)]
        scores: list[float] = []
        carriers_off: list[float] = []
        all_off: list[float] = []
        for what, carriers in zip(MEMORIZED, self._carriers, strict=True):
            if what in LATE:
                continue
            untouched = self._differences(what.caption, nothing)
            scores.append(self._score(untouched))
            for off, into in ((carriers, carriers_off), (everything, all_off)):
                left = similarity(untouched, self._differences(what.caption, off), self._protocol)
                into.append(float(left.max()))
        return {
            "caption_gain": self._caption_gain(),
            "tau": sum(mean_and_std(ordinary)),
            "ordinary_max": max(ordinary),
            "memorized_min": min(scores),
            "memorized_median": float(np.median(scores)),
            "carriers_off": float(np.median(carriers_off)),
            "all_off": float(np.median(all_off)),
        }
