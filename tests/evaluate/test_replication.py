"""Comparing generated images with training images, and with images of the same seed."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from evaluation_parts import noise_image
from PIL import Image
from torch import Tensor

from nemo_ext.evaluate.replication import (
    OriginalComparison,
    WithOriginals,
    hash_distances,
    load_pdq,
    pixel_correlation,
    same_seed_similarity,
    share_above,
)
from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.originals import Originals

FOX, CAT, OTHER = noise_image(1), noise_image(2), noise_image(3)


def compared(similarity: ImageSimilarity, originals: Originals, images: list[Image.Image]) -> WithOriginals:
    found = OriginalComparison(originals, similarity, None).compare("fox", images, similarity.describe(images))
    assert found is not None
    return found


def test_the_most_similar_of_several_originals_counts(similarity: ImageSimilarity) -> None:
    several = compared(similarity, Originals({"fox": (CAT, FOX)}), [FOX, OTHER])
    alone = [compared(similarity, Originals({"fox": (one,)}), [FOX, OTHER]) for one in (CAT, FOX)]
    assert several.similarity == tuple(map(max, zip(*(one.similarity for one in alone), strict=True)))
    assert several.correlation == tuple(map(max, zip(*(one.correlation for one in alone), strict=True)))
    assert several.similarity[0] == pytest.approx(1)


def test_another_prompts_original_that_appears_instead_is_named(similarity: ImageSimilarity) -> None:
    found = compared(similarity, Originals({"fox": (FOX,), "a": (OTHER,), "cat": (CAT,)}), [CAT, FOX])
    assert found.instead == ("cat", None)


def test_no_other_prompt_is_named_if_the_own_original_is_as_near(similarity: ImageSimilarity) -> None:
    assert compared(similarity, Originals({"fox": (FOX,), "cat": (FOX,)}), [FOX]).instead == (None,)


class Given(ImageSimilarity):
    """Every image is as alike the fox's original as the first value says, and the cat's as the second."""

    name = "given"

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor([values], dtype=torch.float64)

    def describe(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.zeros(len(images), 1)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return self.values.expand(len(first), -1)


@pytest.mark.parametrize(("fox", "cat", "instead"), [(0.1, 0.51, "cat"), (0.1, 0.49, None), (0.8, 0.7, None)])
def test_another_prompt_is_named_only_if_the_image_is_a_copy(fox: float, cat: float, instead: str | None) -> None:
    assert compared(Given(fox, cat), Originals({"fox": (FOX,), "cat": (CAT,)}), [OTHER]).instead == (instead,)


def test_a_prompt_without_original_is_not_compared(similarity: ImageSimilarity) -> None:
    comparison = OriginalComparison(Originals({"cat": (CAT,)}), similarity, None)
    assert comparison.compare("fox", [FOX], similarity.describe([FOX])) is None


def test_images_of_two_stages_are_compared_seed_by_seed(similarity: ImageSimilarity) -> None:
    first, second = similarity.describe([FOX, CAT]), similarity.describe([FOX, OTHER])
    values = same_seed_similarity(similarity, first, second)
    assert values[0] == pytest.approx(1)
    assert values[1] == pytest.approx(float(first[1] @ second[1]))


def test_the_share_of_copies_counts_values_above_the_threshold() -> None:
    assert share_above((0.2, 0.5, 0.6, 0.9), 0.5) == 0.5


def test_pixel_correlation_is_pearsons() -> None:
    wanted = np.corrcoef(np.asarray(FOX, float).ravel(), np.asarray(CAT, float).ravel())[0, 1]
    assert pixel_correlation(FOX, CAT) == pytest.approx(wanted)
    assert pixel_correlation(FOX, Image.fromarray(255 - np.asarray(FOX))) == pytest.approx(-1)


def test_pixel_correlation_scales_the_original_and_accepts_plain_gray() -> None:
    assert pixel_correlation(FOX, FOX.resize((64, 64), Image.Resampling.NEAREST)) > 0.9
    assert pixel_correlation(FOX, Image.new("RGB", FOX.size, "gray")) == 0


def test_hash_distance_is_the_smallest_number_of_different_bits() -> None:
    def bits(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.unpackbits(np.asarray(image).ravel()[:2])

    first, second = np.asarray(FOX).ravel()[:2], np.asarray(CAT).ravel()[:2]
    different = sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(first, second, strict=True))
    assert hash_distances([FOX, OTHER], [CAT], bits)[0] == different
    assert hash_distances([FOX], [CAT, FOX], bits) == (0,)


def test_pdq_finds_a_scaled_copy_and_no_other_image() -> None:
    pytest.importorskip("pdqhash", reason="pdqhash has no wheels, and is not needed for anything else")
    pdq = load_pdq()
    assert pdq is not None
    rows, columns = np.mgrid[0:128, 0:128] / 128
    smooth = 128 + 60 * np.sin(7 * rows + 4 * columns**2) + 60 * np.cos(11 * columns * rows)
    picture = Image.fromarray(smooth.astype(np.uint8)).convert("RGB")
    copy, other = hash_distances([picture.resize((96, 96)), noise_image(5, (128, 128))], [picture], pdq)
    assert copy <= 31 < 90 < other <= 256
