"""The similarity of images that needs no model file: what it takes for a copy, and what not."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from nemo_ext.measure.image_similarity import PixelSimilarity

PIXELS = PixelSimilarity()


def noise(seed: int, side: int = 96) -> Image.Image:
    """A picture of blobs, with structure of the size that photographs have."""
    values = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def similarity(first: Image.Image, second: Image.Image) -> float:
    return float(PIXELS.between(PIXELS.describe([first]), PIXELS.describe([second])))


def test_an_image_is_alike_itself_at_another_size() -> None:
    assert similarity(noise(1), noise(1)) == pytest.approx(1.0)
    assert similarity(noise(1), noise(1).resize((240, 240), Image.Resampling.BICUBIC)) > 0.95


def test_different_images_are_not_alike() -> None:
    assert max(similarity(noise(a), noise(b)) for a in range(4) for b in range(4, 8)) < 0.3


def test_a_copy_survives_other_colours_and_some_blur() -> None:
    darker = noise(1).point(lambda value: 0.6 * value + 20)
    assert similarity(noise(1), darker) > 0.95
    assert similarity(noise(1), noise(1).filter(ImageFilter.GaussianBlur(2))) > 0.8


def test_two_smooth_pictures_of_one_colour_are_no_copies() -> None:
    """Plain correlation and structural similarity say that they are."""
    y, x = np.mgrid[0:1:96j, 0:1:96j]
    rng = np.random.default_rng(0)

    def slope(a: float, b: float) -> Image.Image:
        grain = rng.normal(0, 4, (96, 96, 1))
        return Image.fromarray(
            np.clip(np.stack([120 + a * x, 160 + b * y, 60 + a * y], 2) + grain, 0, 255).astype("u1")
        )

    first, second = slope(80, 60), slope(70, 70)
    plain = np.corrcoef(np.asarray(first, float).ravel(), np.asarray(second, float).ravel())[0, 1]
    assert plain > 0.9
    assert similarity(first, second) < 0.3


def test_is_the_correlation_of_what_a_blur_removes() -> None:
    def structure(image: Image.Image) -> np.ndarray:
        small = image.resize((64, 64), Image.Resampling.BOX)
        blurred = small.filter(ImageFilter.GaussianBlur(4))
        return (np.asarray(small, float) - np.asarray(blurred, float)).ravel()

    expected = np.corrcoef(structure(noise(1)), structure(noise(2)))[0, 1]
    assert similarity(noise(1), noise(2)) == pytest.approx(expected, abs=1e-9)


def test_an_image_of_one_colour_is_alike_nothing() -> None:
    plain = Image.new("RGB", (32, 32), (200, 30, 30))
    assert similarity(plain, plain) == similarity(plain, noise(1)) == 0.0


def test_every_image_is_compared_with_every_other() -> None:
    first, second = PIXELS.describe([noise(1), noise(2)]), PIXELS.describe([noise(2), noise(1), noise(3)])
    table = PIXELS.between(first, second)
    assert table.shape == (2, 3)
    assert table.dtype == torch.float64
    assert table[0, 1] == pytest.approx(1.0)
    assert table[1, 0] == pytest.approx(1.0)
