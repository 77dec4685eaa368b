"""How alike the images of different seeds are."""

import itertools

import numpy as np
import pytest
from evaluation_parts import noise_image

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.diversity import seed_similarity
from nemo_ext.measure.image_similarity import ImageSimilarity


def test_it_is_the_median_over_all_pairs_of_different_seeds(similarity: ImageSimilarity) -> None:
    described = similarity.describe([noise_image(seed) for seed in range(5)])
    pairs = [float(described[i] @ described[j]) for i, j in itertools.combinations(range(5), 2)]
    assert seed_similarity(similarity, described) == pytest.approx(np.median(pairs))


def test_equal_images_have_a_similarity_of_one(similarity: ImageSimilarity) -> None:
    assert seed_similarity(similarity, similarity.describe([noise_image(1)] * 3)) == pytest.approx(1)


def test_one_image_has_no_diversity(similarity: ImageSimilarity) -> None:
    with pytest.raises(NemoError, match="2 or more, got 1"):
        seed_similarity(similarity, similarity.describe([noise_image(1)]))
