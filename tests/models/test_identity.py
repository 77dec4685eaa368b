"""Which model is it? Statistics know all that an activation depends on; results and thresholds know the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from tiny_pipeline import Planted, planted_pipeline, tiny_pipeline
from torch import nn

import nemo_ext
from nemo_ext.errors import NemoError
from nemo_ext.models.layers import value_layers
from nemo_ext.models.state import activation_fingerprint, model_fingerprint
from nemo_ext.models.text import skip_text_layers

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
SEEDS = 3
Change = Callable[[StableDiffusionPipeline], object]


@torch.no_grad()
def _another_value(module: nn.Module) -> None:
    next(module.parameters()).flatten()[0] += 1e-3


def _another_scheduler(pipe: StableDiffusionPipeline, **changed: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)


def _another_sampler(pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def _compiled_block(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)


ACTIVATIONS: dict[str, Change] = {
    "a value layer": lambda pipe: _another_value(value_layers(pipe)[MID]),
    "the text encoder": lambda pipe: _another_value(pipe.text_encoder),
    "fewer layers in the text encoder": lambda pipe: skip_text_layers(pipe, 1),
    "the dtype": lambda pipe: pipe.to(torch.bfloat16),
}
THE_REST: dict[str, Change] = {
    "another layer of the U-Net": lambda pipe: _another_value(pipe.unet.conv_out),
    "the autoencoder": lambda pipe: _another_value(pipe.vae.decoder),
    "the noise levels": lambda pipe: _another_scheduler(pipe, beta_end=0.02),
    "what is predicted": lambda pipe: _another_scheduler(pipe, prediction_type="v_prediction"),
    "the size of latents": lambda pipe: pipe.unet.register_to_config(sample_size=24),
}
NOTHING: dict[str, Change] = {
    "the same model again": lambda pipe: None,
    "neurons off": lambda pipe: nemo_ext.patch(pipe, {MID: [0]}),
    "a compiled U-Net": lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet)),
    "a compiled block": _compiled_block,
    "a compiled text encoder": lambda pipe: setattr(pipe, "text_encoder", torch.compile(pipe.text_encoder)),
    "another sampler with these noise levels": _another_sampler,
}


@pytest.mark.parametrize("change", [*ACTIVATIONS, *THE_REST])
def test_the_fingerprint_of_the_model_sees_every_change(change: str) -> None:
    pipe = tiny_pipeline()
    before = model_fingerprint(pipe)
    (ACTIVATIONS | THE_REST)[change](pipe)
    assert model_fingerprint(pipe) != before


@pytest.mark.parametrize("change", ACTIVATIONS)
def test_the_fingerprint_of_activations_sees_what_changes_them(change: str) -> None:
    pipe = tiny_pipeline()
    before = activation_fingerprint(pipe)
    ACTIVATIONS[change](pipe)
    assert activation_fingerprint(pipe) != before


@pytest.mark.parametrize("change", THE_REST)
def test_the_fingerprint_of_activations_sees_nothing_else(change: str) -> None:
    pipe = tiny_pipeline()
    before = activation_fingerprint(pipe)
    THE_REST[change](pipe)
    assert activation_fingerprint(pipe) == before


@pytest.mark.parametrize("change", NOTHING)
def test_what_is_no_change_is_seen_as_none(change: str) -> None:
    pipe = tiny_pipeline()
    before = model_fingerprint(pipe), activation_fingerprint(pipe)
    NOTHING[change](pipe)
    assert (model_fingerprint(pipe), activation_fingerprint(pipe)) == before


def test_activations_of_other_layers_have_another_fingerprint() -> None:
    pipe = tiny_pipeline()
    assert activation_fingerprint(pipe, [MID]) != activation_fingerprint(pipe)


class TestAFineTuneThatLeavesTheTextAlone:
    """Another U-Net with the same value layers and text encoder, as some methods of unlearning train it."""

    @pytest.fixture
    def planted(self) -> Planted:
        return planted_pipeline()

    def test_keeps_statistics_valid_and_no_result(self, planted: Planted, tmp_path: Path) -> None:
        statistics = nemo_ext.collect_statistics(planted.pipe, planted.ordinary_prompts)

        def localizer() -> nemo_ext.Localizer:
            return nemo_ext.Localizer(planted.pipe, statistics=statistics, threshold=0.5, seeds=SEEDS)

        assert localizer().localize_many([planted.memorized_prompt], tmp_path)[0].memorized
        _another_value(planted.pipe.unet.conv_out)
        with pytest.raises(NemoError, match="model"):
            localizer().localize_many([planted.memorized_prompt], tmp_path)
        assert localizer().localize_many([planted.memorized_prompt], tmp_path / "new")[0].memorized

    def test_needs_another_threshold(self, planted: Planted) -> None:
        threshold = nemo_ext.memorization_threshold(planted.pipe, planted.ordinary_prompts[:3], seeds=SEEDS)
        threshold.check(planted.pipe, threshold.protocol, SEEDS)
        _another_value(planted.pipe.unet.conv_out)
        with pytest.raises(NemoError, match="the threshold was measured on another model"):
            threshold.check(planted.pipe, threshold.protocol, SEEDS)

    def test_under_a_localizer_is_refused_before_anything_is_written(self, planted: Planted, tmp_path: Path) -> None:
        statistics = nemo_ext.collect_statistics(planted.pipe, planted.ordinary_prompts)
        localizer = nemo_ext.Localizer(planted.pipe, statistics=statistics, threshold=0.5, seeds=SEEDS)
        planted.pipe.unet.conv_out.weight.data.mul_(2)  # a change that PyTorch does not count
        with pytest.raises(NemoError, match="the model has changed since this Localizer was made"):
            localizer.localize_many([planted.memorized_prompt], tmp_path / "results")
        assert not (tmp_path / "results").exists()
