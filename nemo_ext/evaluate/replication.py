"""Replication: how alike generated images are to the training images, and to the images of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.originals import Originals

if TYPE_CHECKING:
    from PIL.Image import Image

#: The similarities above which shares of images are reported. In the paper of NeMo an image above 0.7 counts as a copy
#: (`nemo_ext.measure.sscd`); 0.5 also counts looser ones.
COPY_THRESHOLDS = (0.5, 0.7)

#: Returns the bits of an image's perceptual hash, [256] of 0 and 1.
PerceptualHash = Callable[["Image"], "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"]


@dataclass(frozen=True)
class WithOriginals:
    """The images of several seeds compared with training images; each field has one value per seed.

    Attributes:
        similarity: the highest similarity with a training image of the prompt.
        instead: the prompt whose training image the image is a copy of (above the first of `COPY_THRESHOLDS`) and more
            alike than to those of its own prompt; None for a seed without one.
        correlation: the highest Pearson correlation of all pixels with a training image of the prompt.
        hash_distance: the smallest number of different bits of the PDQ hashes, from 0 to 256; None without `pdqhash`.
    """

    similarity: tuple[float, ...]
    instead: tuple[str | None, ...]
    correlation: tuple[float, ...]
    hash_distance: tuple[int, ...] | None


class OriginalComparison:
    """Compares images with training images, which are described once.

    Args:
        originals: the training images of all prompts.
        similarity: how alike two images are.
        perceptual_hash: as `load_pdq` returns it; None: there are no hash distances.
    """

    def __init__(
        self, originals: Originals, similarity: ImageSimilarity, perceptual_hash: PerceptualHash | None
    ) -> None:
        self._originals = originals
        self._similarity = similarity
        self._hash = perceptual_hash
        self._prompts = [prompt for prompt, images in originals.items() for _ in images]
        self._described = similarity.describe([image for images in originals.values() for image in images])

    def compare(self, prompt: str, images: Sequence[Image], described: Tensor) -> WithOriginals | None:
        """Compare the images of one prompt; None if the prompt has no training image.

        Args:
            prompt: the text.
            images: one image for each seed.
            described: their descriptions by the similarity.
        """
        if prompt not in self._originals:
            return None
        values = self._similarity.between(described, self._described)
        own = torch.tensor([name == prompt for name in self._prompts])
        highest = values[:, own].amax(1)
        others = [name for name in self._prompts if name != prompt]
        instead: list[str | None] = [None] * len(images)
        if others:
            nearest = values[:, ~own].max(1)
            for seed, (value, place) in enumerate(zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)):
                if value > COPY_THRESHOLDS[0] and value > float(highest[seed]):
                    instead[seed] = others[place]
        originals = self._originals[prompt]
        return WithOriginals(
            similarity=tuple(highest.tolist()),
            instead=tuple(instead),
            correlation=tuple(max(pixel_correlation(image, one) for one in originals) for image in images),
            hash_distance=None if self._hash is None else hash_distances(images, originals, self._hash),
        )


def same_seed_similarity(similarity: ImageSimilarity, first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Compare the images of two stages seed by seed.

    Args:
        similarity: how alike two images are.
        first, second: the descriptions of S images, in the order of the seeds.
    """
    return tuple(similarity.between(first, second).diagonal().tolist())


def share_above(values: Sequence[float], threshold: float) -> float:
    """The share of values above a threshold, from 0 to 1."""
    return sum(value > threshold for value in values) / len(values)


def pixel_correlation(image: Image, original: Image) -> float:
    """The Pearson correlation of all pixels and channels; 0 if one of the images has a single value everywhere.

    Args:
        image: a generated image.
        original: a training image; it is scaled to the size of the generated image.
    """
    if original.size != image.size:
        original = original.resize(image.size)
    first, second = (np.asarray(one.convert("RGB"), np.float64).ravel() for one in (image, original))
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm else 0.0


def hash_distances(
    images: Sequence[Image], originals: Sequence[Image], perceptual_hash: PerceptualHash
) -> tuple[int, ...]:
    """For each image the smallest number of different bits between its hash and that of an original."""
    wanted = [perceptual_hash(one) for one in originals]
    return tuple(min(int((perceptual_hash(image) != one).sum()) for one in wanted) for image in images)


def load_pdq() -> PerceptualHash | None:
    """Return the PDQ hash (github.com/facebook/ThreatExchange), 256 bits; None if `pdqhash` is not installed.

    Its authors call two images alike if at most 31 bits differ.
    """
    try:
        import pdqhash
    except ImportError:
        return None

    def perceptual_hash(image: Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        bits, _ = pdqhash.compute(np.ascontiguousarray(image.convert("RGB")))
        return np.asarray(bits, np.uint8)

    return perceptual_hash
