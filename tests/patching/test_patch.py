"""Patching: what switching neurons off does, and that nothing else changes."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from neurons_off import handle_of, noise, with_rows_zeroed
from tiny_pipeline import DOWN_AND_MID, TEXT_WIDTH, TOKENS, tiny_pipeline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from nemo_ext.demo.captions import MEMORIZED
from nemo_ext.demo.run import load_demo_pipeline
from nemo_ext.errors import NemoError
from nemo_ext.models.layers import value_layers
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patch, patched, unpatch
from nemo_ext.patching.rows import scaled_rows
from nemo_ext.patching.value_projection import ValueProjection

FIRST, SECOND, *_, MID = DOWN_AND_MID
SOME = NeuronSet({FIRST: [0, 5], MID: [3, 30, 31]})
OTHERS = NeuronSet({SECOND: [1, 2, 3], MID: [4]})


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(text_in_up_blocks=True)


def images(pipe: StableDiffusionPipeline) -> Tensor:
    """What the whole pipeline makes of a prompt."""
    generator = torch.Generator().manual_seed(1)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images


def give_value_layers_a_bias(pipe: StableDiffusionPipeline) -> None:
    for layer in DOWN_AND_MID:
        value_layer = pipe.unet.get_submodule(layer)
        value_layer.bias = nn.Parameter(torch.randn(value_layer.out_features, dtype=value_layer.weight.dtype))


class TestPatchedPipeline:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_without_neurons_gives_the_untouched_output_bit_for_bit(
        self, pipe: StableDiffusionPipeline, dtype: torch.dtype
    ) -> None:
        pipe.unet.to(dtype)
        give_value_layers_a_bias(pipe)
        before = noise(pipe)
        patch(pipe)
        assert torch.equal(noise(pipe), before)

    def test_without_neurons_any_longer_gives_the_untouched_output_bit_for_bit(
        self, pipe: StableDiffusionPipeline
    ) -> None:
        before = noise(pipe)
        patch(pipe, SOME)
        handle_of(pipe).set_neurons()
        assert torch.equal(noise(pipe), before)
        with patched(pipe, SOME), scaled_rows(handle_of(pipe), {MID: torch.zeros(2, 32)}):
            assert not torch.equal(noise(pipe), before)
        assert torch.equal(noise(pipe), before)
        patch(pipe, SOME)
        with patched(pipe):
            assert torch.equal(noise(pipe), before)
        patch(pipe, SOME, scale=1.0)
        assert torch.equal(noise(pipe), before)

    def test_without_neurons_is_the_untouched_layer_after_moves_too(self, pipe: StableDiffusionPipeline) -> None:
        untouched = copy.deepcopy(pipe)
        patch(pipe)
        for each in (pipe, untouched):
            each.unet.to(torch.bfloat16)
        assert torch.equal(noise(pipe), noise(untouched))

    def test_without_neurons_generates_the_untouched_images_bit_for_bit(self, pipe: StableDiffusionPipeline) -> None:
        before = images(pipe)
        patch(pipe)
        assert torch.equal(images(pipe), before)

    @pytest.mark.slow
    def test_without_neurons_the_demo_model_generates_its_images_bit_for_bit(self) -> None:
        pipe = load_demo_pipeline()
        caption = MEMORIZED[0].caption

        def generated() -> Tensor:
            generator = torch.Generator().manual_seed(1)
            return pipe(caption, num_inference_steps=25, generator=generator, output_type="pt").images

        before = generated()
        patch(pipe)
        assert torch.equal(generated(), before)

    def test_a_text_is_projected_once_and_not_at_every_step(
        self, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        projections = []
        project = ValueProjection._project
        monkeypatch.setattr(ValueProjection, "_project", lambda *args: projections.append(args[0]) or project(*args))
        patch(pipe, SOME)
        layers = len(value_layers(pipe, "all"))
        images(pipe)
        assert len(projections) == layers
        images(pipe)
        assert len(projections) == layers

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
    def test_neurons_off_are_rows_of_weight_and_bias_zeroed(
        self, pipe: StableDiffusionPipeline, processor: type, bias: bool
    ) -> None:
        if bias:
            give_value_layers_a_bias(pipe)
        pipe.unet.set_attn_processor(processor())
        untouched, expected = noise(pipe), noise(with_rows_zeroed(pipe, SOME))
        patch(pipe, SOME)
        torch.testing.assert_close(noise(pipe), expected, rtol=1e-5, atol=1e-5)
        assert (expected - untouched).abs().max() > 1e-3

    def test_scale_multiplies_values(self, pipe: StableDiffusionPipeline) -> None:
        value_layer = pipe.unet.get_submodule(MID)
        hidden = torch.randn(1, TOKENS, TEXT_WIDTH)
        expected = value_layer(hidden)
        expected[:, :, [3, 30, 31]] *= -0.5
        patch(pipe, SOME, scale=-0.5)
        torch.testing.assert_close(value_layer(hidden), expected, rtol=1e-5, atol=1e-6)

    def test_neurons_can_be_off_in_every_part_of_the_network(self, pipe: StableDiffusionPipeline) -> None:
        up = NeuronSet({"up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v": [1]})
        expected = noise(with_rows_zeroed(pipe, up))
        patch(pipe, up)
        torch.testing.assert_close(noise(pipe), expected, rtol=1e-5, atol=1e-5)

    def test_has_the_state_dict_and_parameters_of_the_untouched_one(self, pipe: StableDiffusionPipeline) -> None:
        before, parameters = pipe.unet.state_dict(), list(pipe.unet.parameters())
        patch(pipe, SOME)
        after = pipe.unet.state_dict()
        assert list(after) == list(before)
        assert all(after[key] is before[key] or torch.equal(after[key], before[key]) for key in after)
        assert all(a is b for a, b in zip(pipe.unet.parameters(), parameters, strict=True))
        pipe.unet.load_state_dict(before)

    def test_keeps_hooks(self, pipe: StableDiffusionPipeline) -> None:
        seen = []
        pipe.unet.get_submodule(MID).register_forward_hook(lambda *_: seen.append("hook"))
        patch(pipe)
        noise(pipe)
        assert seen == ["hook"]

    def test_can_be_patched_again_with_other_neurons(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, SOME)
        once = noise(pipe)
        patch(pipe, SOME)
        assert torch.equal(noise(pipe), once)
        patch(pipe, {SECOND: [1]})
        again = noise(pipe)
        unpatch(pipe)
        patch(pipe, {SECOND: [1]})
        assert torch.equal(noise(pipe), again)

    def test_accepts_a_bare_unet(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe.unet, SOME)
        assert is_patched(pipe)

    def test_has_gradients_of_the_zeroed_weights(self, pipe: StableDiffusionPipeline) -> None:
        value_layer = pipe.unet.get_submodule(MID)
        patch(pipe, SOME)
        value_layer(torch.randn(1, TOKENS, TEXT_WIDTH)).sum().backward()
        off = [3, 30, 31]
        assert value_layer.weight.grad[off].abs().max() == 0
        assert value_layer.weight.grad[0].abs().max() > 0


class TestDevicesAndPrecisions:
    def test_scale_stays_float32_when_the_model_is_halved(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, SOME, scale=0.3)
        pipe.unet.to(torch.bfloat16)
        scale = pipe.unet.get_submodule(MID).neuron_scale
        assert scale.dtype == torch.float32
        assert scale[3] == torch.tensor(0.3)

    def test_scale_goes_along_to_another_device(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe)
        pipe.unet.to("meta")
        assert pipe.unet.get_submodule(MID).neuron_scale.is_meta

    @pytest.mark.parametrize("neurons", [NeuronSet(), SOME])
    def test_on_another_device_it_is_still_known_whether_neurons_are_off(
        self, pipe: StableDiffusionPipeline, neurons: NeuronSet
    ) -> None:
        patch(pipe, neurons)
        pipe.unet.to("meta")
        assert pipe.unet.get_submodule(MID).is_unscaled() == (not neurons)

    def test_half_precision(self, pipe: StableDiffusionPipeline) -> None:
        with torch.no_grad():
            for layer, indices in SOME.items():
                pipe.unet.get_submodule(layer).weight[list(indices)] *= 30  # so that they do more than rounding does
        pipe.unet.to(torch.bfloat16)
        untouched, expected = noise(pipe), noise(with_rows_zeroed(pipe, SOME))
        assert (expected - untouched).abs().max() > 0.25
        patch(pipe, SOME)
        assert noise(pipe).dtype == torch.bfloat16
        torch.testing.assert_close(noise(pipe), expected, rtol=0.05, atol=0.05)

    def test_autocast(self, pipe: StableDiffusionPipeline) -> None:
        value_layer = pipe.unet.get_submodule(MID)
        hidden = torch.randn(1, TOKENS, TEXT_WIDTH)
        patch(pipe, SOME)
        with torch.autocast("cpu", torch.bfloat16):
            values = value_layer(hidden)
            plain = nn.functional.linear(hidden, value_layer.weight)
        assert values.dtype == plain.dtype == torch.bfloat16
        assert values[:, :, [3, 30, 31]].abs().max() == 0
        torch.testing.assert_close(values[:, :, :3], plain[:, :, :3], rtol=0.02, atol=0.02)

    @pytest.mark.slow
    def test_compiled_unet_is_not_compiled_again_for_other_neurons(self, pipe: StableDiffusionPipeline) -> None:
        expected = [noise(with_rows_zeroed(pipe, neurons)) for neurons in (NeuronSet(), SOME)]
        counter = CompileCounter()
        patch(pipe)
        pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
        torch.testing.assert_close(noise(pipe), expected[0], rtol=1e-5, atol=1e-5)
        handle_of(pipe).set_neurons(SOME)
        torch.testing.assert_close(noise(pipe), expected[1], rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1


class TestSetNeurons:
    def test_does_what_patch_does_in_the_same_buffer(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, {SECOND: [1]})
        buffer = pipe.unet.get_submodule(MID).neuron_scale
        address = buffer.data_ptr()
        handle_of(pipe).set_neurons(SOME)
        assert pipe.unet.get_submodule(MID).neuron_scale.data_ptr() == address
        changed = noise(pipe)
        patch(pipe, SOME)
        assert torch.equal(noise(pipe), changed)

    def test_changes_what_was_patched_under_inference_mode(self, pipe: StableDiffusionPipeline) -> None:
        with torch.inference_mode():
            patch(pipe)
        handle_of(pipe).set_neurons(SOME)
        torch.testing.assert_close(noise(pipe), noise(with_rows_zeroed(pipe, SOME)), rtol=1e-5, atol=1e-5)

    def test_wants_a_patched_pipeline(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match=rf"{FIRST} is not patched: call nemo_ext.patch\(pipe\) first"):
            handle_of(pipe).set_neurons(SOME)


class TestUnpatch:
    def test_gives_a_bit_identical_pipeline_back(self, pipe: StableDiffusionPipeline) -> None:
        before, attributes = images(pipe), {layer: set(vars(pipe.unet.get_submodule(layer))) for layer in DOWN_AND_MID}
        patch(pipe, SOME)
        assert not torch.equal(images(pipe), before)
        unpatch(pipe)
        assert torch.equal(images(pipe), before)
        for layer in DOWN_AND_MID:
            value_layer = pipe.unet.get_submodule(layer)
            assert type(value_layer) is nn.Linear
            assert set(vars(value_layer)) == attributes[layer]
            assert not value_layer._buffers
            assert not value_layer._non_persistent_buffers_set

    def test_does_nothing_where_nothing_is_patched(self, pipe: StableDiffusionPipeline) -> None:
        unpatch(pipe)
        assert not is_patched(pipe)


class TestPatchedContext:
    def test_undoes_itself_after_an_exception(self, pipe: StableDiffusionPipeline) -> None:
        before = noise(pipe)

        def interrupted() -> None:
            with patched(pipe, SOME):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            interrupted()
        assert not is_patched(pipe)
        assert torch.equal(noise(pipe), before)

    def test_gives_an_earlier_patch_back(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, SOME, scale=0.5)
        before, buffer = noise(pipe), pipe.unet.get_submodule(MID).neuron_scale
        with patched(pipe, {SECOND: [1]}):
            assert not torch.equal(noise(pipe), before)
        assert torch.equal(noise(pipe), before)
        assert pipe.unet.get_submodule(MID).neuron_scale is buffer

    def test_gives_an_earlier_patch_back_even_if_the_block_unpatches(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, SOME)
        before = noise(pipe)
        with patched(pipe):
            unpatch(pipe)
        assert torch.equal(noise(pipe), before)


class TestRefusals:
    """Each names the layer, and leaves the pipeline as it was."""

    @pytest.mark.parametrize(
        ("neurons", "said"),
        [
            ({"mid_block.to_v": [0]}, "no value layer 'mid_block.to_v'"),
            ({MID: [32]}, f"{MID} has neurons 0 to 31, got 32"),
            ({MID: [-1]}, f"{MID}: a neuron index must be a whole number of 0 or more, got -1"),
        ],
    )
    def test_neurons_that_do_not_exist(
        self, pipe: StableDiffusionPipeline, neurons: dict[str, list[int]], said: str
    ) -> None:
        with pytest.raises(NemoError, match=said):
            patch(pipe, neurons)
        assert not is_patched(pipe)

    def test_scale_that_is_not_finite(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="scale must be a finite number, got nan"):
            patch(pipe, SOME, scale=float("nan"))

    def test_layer_that_cannot_be_patched(self, pipe: StableDiffusionPipeline) -> None:
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        attention.to_v = nn.Identity()
        with pytest.raises(NemoError, match=rf"{MID} must be a torch.nn.Linear, got .*Identity"):
            patch(pipe)
        assert not is_patched(pipe)

    def test_layer_whose_forward_is_replaced_by_hooks(self, pipe: StableDiffusionPipeline) -> None:
        value_layer = pipe.unet.get_submodule(MID)
        value_layer.forward = value_layer.forward
        with pytest.raises(NemoError, match=rf"{MID} has a forward of its own"):
            patch(pipe)
        assert not is_patched(pipe)
