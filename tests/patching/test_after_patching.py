"""Whatever is done to a pipeline after patching: the neurons stay off, or the caller is told that they do not."""

import copy
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from neurons_off import noise, with_rows_zeroed
from tiny_pipeline import DOWN_AND_MID, tiny_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError, NemoWarning
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patch, patched, unpatch

FIRST, *_, MID = DOWN_AND_MID
SOME = NeuronSet({FIRST: [0, 5], MID: [3, 30, 31]})


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """A pipeline in which neurons are off."""
    made = tiny_pipeline()
    patch(made, SOME)
    return made


def images(pipe: StableDiffusionPipeline) -> Tensor:
    return pipe("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(1), output_type="pt").images


def assert_off(pipe: StableDiffusionPipeline) -> None:
    """The pipeline computes what it would with the rows of the neurons zeroed, in the weights that it has now."""
    plain = copy.deepcopy(pipe)
    unpatch(plain)
    torch.testing.assert_close(noise(pipe), noise(with_rows_zeroed(plain, SOME)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noise(pipe), noise(plain), atol=1e-5)


class TestWeights:
    def test_changed_in_place(self, pipe: StableDiffusionPipeline) -> None:
        noise(pipe)
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.data.mul_(0.9)
        assert_off(pipe)

    def test_of_an_average_swapped_in_and_out(self, pipe: StableDiffusionPipeline) -> None:
        average = EMAModel(pipe.unet.parameters())
        average.shadow_params = [0.9 * parameter for parameter in average.shadow_params]
        before = noise(pipe)
        average.store(pipe.unet.parameters())
        average.copy_to(pipe.unet.parameters())
        assert not torch.equal(noise(pipe), before)
        assert_off(pipe)
        average.restore(pipe.unet.parameters())
        assert torch.equal(noise(pipe), before)

    def test_loaded(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet.load_state_dict(tiny_pipeline(seed=1).unet.state_dict())
        assert_off(pipe)

    def test_cast_and_moved(self, pipe: StableDiffusionPipeline) -> None:
        pipe.to(torch.bfloat16)
        assert noise(pipe).dtype == torch.bfloat16
        pipe.to(torch.float32)
        assert_off(pipe)

    def test_stored_in_eight_bits_between_calls(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert pipe.unet.get_submodule(MID).weight.dtype == torch.float8_e4m3fn
        values = pipe.unet.get_submodule(MID)(torch.randn(1, 4, 32))
        assert values[..., list(SOME[MID])].abs().max() == 0
        assert values.abs().max() > 0

    def test_saved_come_with_a_warning_that_they_are_on_again(
        self, pipe: StableDiffusionPipeline, tmp_path: Path
    ) -> None:
        with pytest.warns(NemoWarning, match=r"loaded again, the neurons are on; nemo_ext.bake writes"):
            pipe.save_pretrained(tmp_path)
        pipe = tiny_pipeline()
        patch(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.save_pretrained(tmp_path)


class TestCopies:
    def test_deep(self, pipe: StableDiffusionPipeline) -> None:
        copied = copy.deepcopy(pipe)
        assert_off(copied)
        assert torch.equal(images(copied), images(pipe))
        unpatch(copied)
        assert is_patched(pipe)
        assert_off(pipe)

    def test_pickled(self, pipe: StableDiffusionPipeline) -> None:
        loaded = pickle.loads(pickle.dumps(pipe.unet))
        wanted, untouched = noise(pipe), noise(tiny_pipeline())
        pipe.unet = loaded
        assert torch.equal(noise(pipe), wanted)
        unpatch(pipe)
        assert torch.equal(noise(pipe), untouched)

    def test_of_the_pipeline_around_the_same_unet(self, pipe: StableDiffusionPipeline) -> None:
        assert_off(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))


class TestAnotherUnet:
    def test_in_the_pipeline_brings_a_warning_at_the_next_generation(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet = tiny_pipeline(seed=1).unet
        with pytest.warns(NemoWarning, match="the denoiser of this pipeline was replaced after patching"):
            images(pipe)
        patch(pipe, SOME)
        with warnings.catch_warnings():
            warnings.simplefilter("error", NemoWarning)
            images(pipe)
        assert_off(pipe)

    def test_compiled_from_the_patched_one_is_none(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error", NemoWarning)
            images(pipe)

    def test_in_another_pipeline_with_the_same_text_encoder_is_none_of_this_ones(
        self, pipe: StableDiffusionPipeline
    ) -> None:
        other = StableDiffusionPipeline(
            **{**pipe.components, "unet": tiny_pipeline(seed=1).unet}, requires_safety_checker=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", NemoWarning)
            images(other)
            with patched(other, SOME):
                images(other)
                images(pipe)
        assert_off(pipe)


class TestFusedProjections:
    def test_are_an_error_at_the_next_call_and_unfused_they_are_not(self, pipe: StableDiffusionPipeline) -> None:
        before = noise(pipe)
        pipe.unet.fuse_qkv_projections()
        with pytest.raises(NemoError, match=rf"{FIRST} was fused with to_k after .* unfuse_qkv_projections\(\)"):
            noise(pipe)
        pipe.unet.unfuse_qkv_projections()
        assert torch.equal(noise(pipe), before)

    def test_are_none_of_an_unpatched_pipelines(self, pipe: StableDiffusionPipeline) -> None:
        unpatch(pipe)
        wanted = noise(pipe)
        pipe.unet.fuse_qkv_projections()
        torch.testing.assert_close(noise(pipe), wanted, rtol=1e-4, atol=1e-5)


class TestOtherModules:
    def test_in_place_of_a_value_layer_are_an_error_at_the_next_call(self, pipe: StableDiffusionPipeline) -> None:
        attention = pipe.unet.get_submodule(MID.rpartition(".")[0])
        attention.to_v = torch.nn.Linear(32, 32, bias=False)
        with pytest.raises(NemoError, match=rf"{MID} was replaced by torch.nn.modules.linear.Linear after patching"):
            noise(pipe)


class TestLora:
    @pytest.fixture
    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)

    @pytest.mark.parametrize("scale", [0.0, 0.5])
    @pytest.mark.parametrize("fused", [False, True])
    def test_loaded_or_fused_leaves_the_neurons_off(self, config: peft.LoraConfig, scale: float, fused: bool) -> None:
        pipe, plain = tiny_pipeline(), tiny_pipeline()
        patch(pipe, SOME, scale=scale)
        for one in (pipe, plain):
            torch.manual_seed(1)
            one.unet.add_adapter(config)
            if fused:
                one.unet.fuse_lora()
        hidden = torch.randn(2, 4, 32)
        for layer in DOWN_AND_MID:
            expected = plain.unet.get_submodule(layer)(hidden).detach()
            expected[..., list(SOME.get(layer, ()))] *= scale
            torch.testing.assert_close(pipe.unet.get_submodule(layer)(hidden).detach(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(noise(pipe), noise(plain), atol=1e-5)

    def test_loaded_leaves_neurons_off_in_each_row_of_a_batch(
        self, pipe: StableDiffusionPipeline, config: peft.LoraConfig
    ) -> None:
        pipe.unet.add_adapter(config)
        layer = pipe.unet.get_submodule(MID)
        layer.base_layer.neuron_scale = torch.stack([torch.ones(32), torch.zeros(32)])
        values = layer(torch.randn(2, 4, 32))
        assert values[0].abs().max() > 0
        assert values[1].abs().max() == 0

    def test_unpatched_again_is_as_if_never_patched(
        self, pipe: StableDiffusionPipeline, config: peft.LoraConfig
    ) -> None:
        plain = tiny_pipeline()
        for one in (pipe, plain):
            torch.manual_seed(1)
            one.unet.add_adapter(config)
        unpatch(pipe)
        assert torch.equal(noise(pipe), noise(plain))

    def test_unloaded_leaves_the_neurons_off(self, pipe: StableDiffusionPipeline, config: peft.LoraConfig) -> None:
        pipe.unet.add_adapter(config)
        pipe.unload_lora_weights()
        assert_off(pipe)

    def test_that_is_there_before_patching_is_refused_with_the_next_thing_to_do(self, config: peft.LoraConfig) -> None:
        pipe = tiny_pipeline()
        pipe.unet.add_adapter(config)
        with pytest.raises(NemoError, match=r"merge the LoRA into the weights \(pipe.fuse_lora\(\)\)"):
            patch(pipe, SOME)
        pipe.unet.fuse_lora()
        with pytest.raises(NemoError, match=r"now remove the wrapper with pipe.unload_lora_weights\(\)"):
            patch(pipe, SOME)
        pipe.unload_lora_weights()
        patch(pipe, SOME)
        assert_off(pipe)


class TestEightBitStorage:
    def test_before_patching_or_collecting_statistics_is_refused_by_name(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        said = rf"{FIRST} stores its weights as torch.float8_e4m3fn \(layerwise casting\?\)"
        for what in (lambda: patch(pipe, SOME), lambda: collect_statistics(pipe, ["a cat", "a dog"])):
            with pytest.raises(NemoError, match=said):
                what()
        assert memorization_score(pipe, "a cat", seeds=2).max < 1
