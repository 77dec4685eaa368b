"""How alike two images are (docs/method.md, section 12): the interface, and the measure that needs no model file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from PIL.Image import Image

# The side of the pictures that `PixelSimilarity` compares, and the radius of the blur that it removes, in their pixels.
_SIDE, _BLUR = 64, 4


class ImageSimilarity(ABC):
    """Compares images. An image is described once, and the descriptions are compared.

    Attributes:
        name: what is measured, in results and tables. It is different for every measure and every model file.
    """

    name: str

    @abstractmethod
    def describe(self, images: Sequence[Image]) -> Tensor:
        """Describe B RGB images: [B, …] on the CPU. The images can have different sizes."""

    @abstractmethod
    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Compare every description of `first` with every one of `second`: [A, B] float64, at most 1."""


class PixelSimilarity(ImageSimilarity):
    """Correlation of the structure of small pictures, that is, of what differs from their blurred copies.

    It needs no model file. Plain correlation and structural similarity take two smooth pictures of one colour for
    copies; this measure does not. It is less reliable than SSCD: an image that is shifted or mirrored counts as
    another one. docs/method.md, section 12, compares the two.
    """

    name = "pixels (correlation of structure)"

    def describe(self, images: Sequence[Image]) -> Tensor:
        """Pictures of 64×64 pixels minus blurred copies, [B, 3·64·64] float64 of length 1; zeros for one colour."""
        from PIL import Image as pictures
        from PIL import ImageFilter

        blur = ImageFilter.GaussianBlur(_BLUR)
        small = [image.convert("RGB").resize((_SIDE, _SIDE), pictures.Resampling.BOX) for image in images]
        structure = np.stack([np.asarray(one, np.float64) - np.asarray(one.filter(blur), np.float64) for one in small])
        described = torch.from_numpy(structure).flatten(1)
        return functional.normalize(described - described.mean(1, keepdim=True), dim=1)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """The Pearson correlation of every two descriptions, from -1 to 1."""
        return (first @ second.T).clamp(max=1)
