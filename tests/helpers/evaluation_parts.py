"""Small stand-ins for what an evaluation needs: results of a search, a similarity of images, images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tiny_pipeline import DOWN_AND_MID
from torch import Tensor

from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Localization


class ColourSimilarity(ImageSimilarity):
    """The cosine of the mean colours of an image's four quarters, less gray: simple, and like no real measure."""

    name = "colours (of quarters)"

    def describe(self, images: Sequence[Image.Image]) -> Tensor:
        small = [np.asarray(image.convert("RGB").resize((2, 2), Image.Resampling.BOX), np.float64) for image in images]
        rows = torch.from_numpy(np.stack(small)).flatten(1) - 127.5
        return torch.nn.functional.normalize(rows, dim=1)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T).clamp(max=1)


def noise_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image of random pixels; equal seeds give equal images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def localization(prompt: str, neurons: NeuronSet, model: str, *, memorized: bool = True) -> Localization:
    """A result as a search leaves it, as far as an evaluation reads it."""
    return Localization(
        prompt=prompt,
        memorized=memorized,
        score_before=0.9 if memorized else 0.1,
        score_after=0.1 if memorized else None,
        floor=None,
        threshold=0.4,
        threshold_used=0.4 if memorized else None,
        notes=(),
        theta=None,
        top_k=None,
        initial_neurons=NeuronSet(),
        neurons=neurons,
        kept_seeds=(0, 1) if memorized else (),
        unet_samples=1.0,
        seconds=1.0,
        certificate=None,
        search="grouped",
        protocol=Protocol.paper(),
        seeds=2,
        layers=tuple(DOWN_AND_MID),
        similarity_scales=1,
        model=model,
        statistics="",
    )
