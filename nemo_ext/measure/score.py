"""The score of a prompt: the similarity of its noise differences across seeds (docs/method.md, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling, sample_images, sampler_of
from nemo_ext.measure.image_similarity import ImageSimilarity, PixelSimilarity
from nemo_ext.measure.memory import fitting_batch_size
from nemo_ext.measure.noise import initial_latents, noise_differences
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity as map_similarity
from nemo_ext.measure.similarity import similarity_scales
from nemo_ext.models.family import TextEmbedding
from nemo_ext.models.text import encode_prompts
from nemo_ext.torch_state import plain_torch


@dataclass(frozen=True, eq=False)
class MemorizationScore:
    """How alike a prompt's noise differences are across seeds (docs/method.md, section 5).

    Attributes:
        pairs: [S, S] float64, the similarity of every two seeds' δ; 1 on the diagonal.
        per_seed: S numbers, each seed's highest similarity with another seed.
        max: the highest of these numbers, which is the prompt's score.
    """

    pairs: Tensor

    @property
    def per_seed(self) -> tuple[float, ...]:
        others = self.pairs.clone().fill_diagonal_(-math.inf)
        return tuple(others.amax(1).tolist())

    @property
    def max(self) -> float:
        return max(self.per_seed)


def seed_latents(pipe: Any, seeds: int, protocol: Protocol) -> Tensor:
    """Draw `initial_latents`, after a check that they can be compared.

    Args:
        pipe, seeds, protocol: as for `initial_latents`.

    Returns:
        x_T of every seed, [S, C, H, W] float32 on the CPU.

    Raises:
        NemoError: there are fewer than two seeds, or the latents are smaller than the similarity's window.
    """
    if seeds < 2:
        raise NemoError(f"a score compares seeds: wanted 2 or more, got {seeds}")
    latents = initial_latents(pipe, seeds, protocol)
    height, width = latents.shape[-2:]
    similarity_scales(height, width, protocol.window_sigma)
    return latents


def pairwise_score(differences: Tensor, protocol: Protocol) -> MemorizationScore:
    """Compute the score of a prompt from its noise differences δ, [S, C, H, W] (docs/method.md, section 5).

    Raises:
        NemoError: all δ are the same, so that the denoiser does not depend on the seed.
    """
    if bool((differences == differences[:1]).all()):
        raise NemoError(
            "all seeds have exactly the same noise difference, so the denoiser does not depend on its latents: its "
            "weights are damaged, or it predicts something else than noise"
        )
    # All pairs are compared in one call, because an inferred data range depends on all maps of the call.
    seeds = len(differences)
    first, second = torch.combinations(torch.arange(seeds)).unbind(1)
    values = map_similarity(differences[first], differences[second], protocol).double().cpu()
    pairs = torch.eye(seeds, dtype=torch.float64)
    pairs[first, second] = values
    pairs[second, first] = values
    return MemorizationScore(pairs)


@plain_torch()
def memorization_score(
    pipe: Any,
    prompt: str,
    *,
    seeds: int = 10,
    protocol: Protocol | None = None,
    batch_size: int | None = None,
    images: bool = False,
    sampling: Sampling | None = None,
    similarity: ImageSimilarity | None = None,
) -> MemorizationScore:
    """Measure how much a prompt is memorized: the similarity of its δ across seeds (docs/method.md, section 5).

    With `images`, whole images of several seeds are generated and compared by the same rule (section 12). That costs
    more, and finds prompts whose first step looks ordinary. Their scores are compared with τ_image and not with τ.

    Neurons that a patch has switched off stay off. The same seeds give the same result up to rounding.

    Args:
        pipe: a pipeline.
        prompt: the text.
        seeds: S ≥ 2.
        protocol: how to measure; None: `Protocol.paper()`.
        batch_size: latents in one call of the denoiser. It changes the result by rounding only. None: as many as
            memory allows (`fitting_batch_size`), at most `seeds`.
        images: whether images are compared. `seeds` and `protocol` are not used then.
        sampling: how images are generated; None: `Sampling()`.
        similarity: how alike two images are; None: `PixelSimilarity()`.

    Returns:
        The similarity of every two seeds, each seed's score, and the prompt's score.

    Raises:
        NemoError: there are fewer than two seeds, the latents are smaller than the similarity's window, or as for
            `noise_differences` and `image_score`.
    """
    text = encode_prompts(pipe, [prompt])
    if images:
        rows = fitting_batch_size(pipe, text) if batch_size is None else batch_size
        resolved = (sampling or Sampling()).resolved(pipe)
        return image_score(pipe, prompt, resolved, similarity or PixelSimilarity(), batch_size=rows)
    return score_of_embedding(pipe, text, seeds, protocol or Protocol.paper(), batch_size)


def score_of_embedding(
    pipe: Any,
    text: TextEmbedding,
    seeds: int,
    protocol: Protocol,
    batch_size: int | None,
    guidance: tuple[float, TextEmbedding] | None = None,
) -> MemorizationScore:
    """Do what `memorization_score` does for the embedding of a text, with `guidance` as in `noise_differences`."""
    latents = seed_latents(pipe, seeds, protocol)
    rows = min(seeds, fitting_batch_size(pipe, text) if batch_size is None else batch_size)
    differences = noise_differences(pipe, text, latents, protocol, batch_size=rows, guidance=guidance)
    return pairwise_score(differences, protocol)


def image_score(
    pipe: Any, prompt: str, sampling: Sampling, similarity: ImageSimilarity, *, batch_size: int
) -> MemorizationScore:
    """Compare the images of several seeds as `memorization_score` compares their δ (docs/method.md, section 12).

    Args:
        pipe: a pipeline. Neurons that a patch has switched off stay off.
        prompt: the text.
        sampling: how the images are generated, with the guidance as a number (`Sampling.resolved`).
        similarity: how alike two images are.
        batch_size: the number of latents in one call of the denoiser; with guidance each image takes two.

    Raises:
        NemoError: the images are not finite.
    """
    images = sample_images(sampler_of(pipe), prompt, sampling, sampling.all_seeds, batch_size=batch_size)
    described = similarity.describe(images)
    pairs = similarity.between(described, described)
    pairs.fill_diagonal_(1.0)
    return MemorizationScore(pairs)
