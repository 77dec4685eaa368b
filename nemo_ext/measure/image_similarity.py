"""How alike two images are (docs/method.md, section 12): the interface, and the measure that needs no model file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

#: The side of the gray pictures that `PixelSimilarity` compares.
_SIDE = 64


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
    """Structural similarity or correlation of small gray pictures, whichever is lower.

    It needs no model file, and it is less reliable than SSCD: an image that is shifted or mirrored counts as another
    one.
    """

    name = "pixels (structural similarity and correlation)"

    def describe(self, images: Sequence[Image]) -> Tensor:
        """Gray pictures of 64×64 pixels, [B, 1, 64, 64] float64 from 0 to 1."""
        from PIL import Image as pictures

        small = [image.convert("L").resize((_SIDE, _SIDE), pictures.Resampling.BOX) for image in images]
        return torch.from_numpy(np.stack([np.asarray(one, np.float64) / 255 for one in small])).unsqueeze(1)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """The lower one of the structural similarity (σ = 1.5) and the correlation of each pair; 0 for one colour."""
        raise NotImplementedError
