"""Runs on the planted pipeline."""

from tiny_pipeline import Planted

from nemo_ext.measure.noise import evaluate_zeros
from nemo_ext.models.text import encode_prompts
from nemo_ext.search.partial_unet import EntryPoints


def find_entry_points(planted: Planted, layers: list[str]) -> EntryPoints:
    """Where the planted pipeline's U-Net can be entered."""
    text = encode_prompts(planted.pipe, [planted.memorized_prompt])
    found = EntryPoints.of(planted.pipe.unet, layers, lambda rows: evaluate_zeros(planted.pipe, text, rows))
    assert found is not None
    return found
