"""What the tests of several commands need: a pipeline with planted neurons, and its folder."""

from pathlib import Path

import pytest
from tiny_pipeline import Planted, planted_pipeline


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def model(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted pipeline, saved as diffusers saves it."""
    folder = tmp_path_factory.mktemp("model")
    # What was set on a module by hand has to be in the configuration to be there after loading.
    planted.pipe.unet.register_to_config(norm_eps=planted.pipe.unet.conv_norm_out.eps)
    planted.pipe.save_pretrained(folder)
    return folder
