"""Diversity: how alike the images of different seeds of one prompt are."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.image_similarity import ImageSimilarity


def seed_similarity(similarity: ImageSimilarity, described: Tensor) -> float:
    """The median similarity over all pairs of different seeds of one prompt. Lower values mean more diverse images.

    The published script `metrics/compute_diversity.py` takes the median over these pairs, too.

    Args:
        similarity: how alike two images are.
        described: the descriptions of the images of S ≥ 2 seeds.

    Raises:
        NemoError: there is only one image.
    """
    seeds = len(described)
    if seeds < 2:
        raise NemoError(f"diversity compares the images of different seeds: wanted 2 or more, got {seeds}")
    first, second = torch.combinations(torch.arange(seeds)).unbind(1)
    pairs: list[float] = similarity.between(described, described)[first, second].tolist()
    return statistics.median(pairs)
