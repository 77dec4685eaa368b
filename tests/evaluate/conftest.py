"""A pipeline with planted neurons, and results that belong to it."""

import pytest
from evaluation_parts import ColourSimilarity, localization
from tiny_pipeline import Planted, planted_pipeline

from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Localization


@pytest.fixture
def similarity() -> ImageSimilarity:
    return ColourSimilarity()


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def results(planted: Planted) -> list[Localization]:
    """Two memorized prompts, and between them one that is not."""
    model = model_fingerprint(planted.pipe)
    return [
        localization(planted.memorized_prompt, planted.neurons, model),
        localization(planted.ordinary_prompts[0], NeuronSet(), model, memorized=False),
        localization("zoo zebra", planted.neurons, model),
    ]
