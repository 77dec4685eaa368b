"""What is logged after a training stage about memorization: scores, τ and the floor."""

from __future__ import annotations

import random

import numpy as np
import torch

from nemo_ext.demo.captions import MEMORIZED, ordinary_captions
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity
from nemo_ext.measure.threshold import mean_and_std

from .diffusion import Deviation, Loss, TextToNoise
from .unet import LATENT_CHANNELS, LATENT_SIZE, RowScales

_SEEDS = 6
_TIMESTEP = 981  # the first of a 50-step DDIM schedule
_ORDINARY = 32


class Monitor:
    """Measures the scores of memorized and ordinary captions, and the remaining memorization, during training."""

    def __init__(self, model: TextToNoise, loss: Loss, scales: RowScales, deviation: Deviation):
        self._model, self._loss, self._scales, self._deviation = model, loss, scales, deviation
        self._protocol = Protocol.paper()

    @torch.no_grad()
    def _differences(self, caption: str, off: torch.Tensor | None = None) -> torch.Tensor:
        latents = torch.randn(
            _SEEDS, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        hidden = self._model.hidden(self._loss.tokens([caption])).expand(_SEEDS, -1, -1)
        if off is not None:
            scale = torch.ones(_SEEDS, self._scales.total)
            scale[:, off] = 0
            self._scales.scale = scale
        try:
            noise = self._model(latents, torch.full((_SEEDS,), _TIMESTEP), hidden)
        finally:
            self._scales.scale = None
        difference = noise - latents
        low = difference.amin((2, 3), keepdim=True)
        return (difference - low) / (difference.amax((2, 3), keepdim=True) - low)

    def _score(self, maps: torch.Tensor) -> float:
        first, second = torch.triu_indices(_SEEDS, _SEEDS, 1)
        return float(similarity(maps[first], maps[second], self._protocol).max())

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the figures: name -> value. `top12_off` is with each caption's 12 most deviating neurons off."""
        rng = random.Random(0)
        self._model.eval()
        ordinary = [self._score(self._differences(c)) for _, c in ordinary_captions(_ORDINARY, seed=1)]
        order = self._deviation(rng).argsort(1, descending=True)
        everything = torch.arange(self._scales.total)
        memorized: list[float] = []
        floor: list[float] = []
        top12: list[float] = []
        for index, what in enumerate(MEMORIZED):
            untouched = self._differences(what.caption)
            memorized.append(self._score(untouched))
            for off, into in ((everything, floor), (order[index, :12], top12)):
                left = similarity(untouched, self._differences(what.caption, off), self._protocol)
                into.append(float(left.max()))
        self._model.train()
        return {
            "tau": sum(mean_and_std(ordinary)),
            "ordinary_max": max(ordinary),
            "memorized_min": min(memorized),
            "memorized_median": float(np.median(memorized)),
            "floor_median": float(np.median(floor)),
            "floor_max": max(floor),
            "top12_off_median": float(np.median(top12)),
        }
