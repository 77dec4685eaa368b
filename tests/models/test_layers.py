"""Which value layers a model has, in what order, and which models are refused."""

from collections.abc import Callable

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from tiny_pipeline import DOWN_AND_MID, TEXT_WIDTH, tiny_pipeline
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import ValueStack
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import denoiser_of
from nemo_ext.models.state import evaluating

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


class TestValueLayers:
    def test_are_the_papers_seven_in_network_order(self, pipe: StableDiffusionPipeline) -> None:
        layers = value_layers(pipe)
        assert {layer: module.out_features for layer, module in layers.items()} == DOWN_AND_MID
        assert list(layers) == list(DOWN_AND_MID)

    def test_all_adds_the_up_blocks_after_the_mid_block(self) -> None:
        layers = list(value_layers(tiny_pipeline(text_in_up_blocks=True), "all"))
        assert len(layers) == 16
        assert layers[:7] == list(DOWN_AND_MID)
        assert [layer.split(".attentions")[0] for layer in layers[7:]] == [
            f"up_blocks.{block}" for block in (1, 2, 3) for _ in range(3)
        ]

    def test_names_come_back_in_network_order(self, pipe: StableDiffusionPipeline) -> None:
        first = next(iter(DOWN_AND_MID))
        assert list(value_layers(pipe, [MID, first])) == [first, MID]

    def test_are_the_modules_of_that_name(self, pipe: StableDiffusionPipeline) -> None:
        for layer, module in value_layers(pipe).items():
            assert pipe.unet.get_submodule(layer) is module

    def test_are_found_in_a_bare_and_in_a_compiled_unet(self, pipe: StableDiffusionPipeline) -> None:
        assert list(value_layers(pipe.unet)) == list(DOWN_AND_MID)
        assert denoiser_of(torch.compile(pipe.unet)) is pipe.unet
        assert list(value_layers(torch.compile(pipe.unet))) == list(DOWN_AND_MID)


class TestRefusals:
    def test_unknown_name_with_the_nearest_one(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match=rf"no value layer '{MID[:-1]}k'; did you mean '{MID}'"):
            value_layers(pipe, [f"{MID[:-1]}k"])

    def test_unknown_name_unlike_any_with_all_of_them(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match=f"no value layer 'up'; it has {', '.join(DOWN_AND_MID)}"):
            value_layers(pipe, "up")

    def test_no_names_at_all(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="no layers given"):
            value_layers(pipe, [])

    def test_not_a_model(self) -> None:
        with pytest.raises(NemoError, match=r"wanted a diffusers pipeline .* got int"):
            value_layers(3)

    def test_unet_that_reads_no_text(self) -> None:
        unet = UNet2DModel(
            block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
        )
        with pytest.raises(NemoError, match="UNet2DModel has no cross-attention"):
            value_layers(unet)

    def test_only_up_blocks_read_text(self) -> None:
        unet = tiny_pipeline(text_in_up_blocks=True).unet
        unet.down_blocks, unet.mid_block = nn.ModuleList(), None
        with pytest.raises(NemoError, match=r'the layers "down\+mid" of this model have no cross-attention'):
            value_layers(unet)
        assert len(value_layers(unet, "all")) == 9

    def test_fused_projections(self, pipe: StableDiffusionPipeline) -> None:
        pipe.fuse_qkv_projections(vae=False)
        with pytest.raises(NemoError, match=rf"{next(iter(DOWN_AND_MID))} is fused .* unfuse_qkv_projections"):
            value_layers(pipe)
        pipe.unfuse_qkv_projections()
        assert list(value_layers(pipe)) == list(DOWN_AND_MID)

    @staticmethod
    def _wrapped_by_lora(linear: nn.Linear) -> nn.Module:
        wrapper = nn.Module()
        wrapper.base_layer = linear
        return wrapper

    @staticmethod
    def _quantized(linear: nn.Linear) -> nn.Module:
        class Linear4bit(nn.Linear):
            pass

        return Linear4bit(linear.in_features, linear.out_features)

    @pytest.mark.parametrize(
        ("replaced", "said"),
        [
            (_wrapped_by_lora, rf"{MID} must be a torch.nn.Linear, got .*Module: merge the LoRA"),
            (_quantized, rf"{MID} must be a torch.nn.Linear, got .*Linear4bit"),
            (lambda linear: nn.Linear(8, linear.out_features), rf"{MID} reads texts 8 wide, .* {TEXT_WIDTH}"),
            (lambda linear: linear.to("meta"), rf"{MID} has its weights on the meta device"),
        ],
    )
    def test_value_layer_that_is_not_a_plain_linear(
        self, pipe: StableDiffusionPipeline, replaced: Callable[[nn.Linear], nn.Module], said: str
    ) -> None:
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        attention.to_v = replaced(attention.to_v)
        with pytest.raises(NemoError, match=said):
            value_layers(pipe)

    def test_added_key_and_value_projections(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.added_kv_proj_dim = 8
        with pytest.raises(NemoError, match=rf"{MID}: cross-attentions with added key and value"):
            value_layers(pipe)


class TestValueStack:
    def test_activation_is_the_mean_over_tokens_of_the_absolute_values(self, pipe: StableDiffusionPipeline) -> None:
        hidden = torch.randn(3, 5, TEXT_WIDTH)
        stack = ValueStack(value_layers(pipe))
        for layer, activation in stack.split(stack.activations(hidden)).items():
            weight = pipe.unet.get_submodule(layer).weight.detach().double().numpy()
            expected = numpy.abs(hidden.double().numpy() @ weight.T).mean(axis=1)
            numpy.testing.assert_allclose(activation, expected, rtol=1e-5, atol=1e-7)

    def test_layers_without_a_bias_count_as_zero_beside_others(self) -> None:
        with_bias, without = nn.Linear(4, 2), nn.Linear(4, 3, bias=False)
        stack = ValueStack({"a": with_bias, "b": without})
        assert stack.bias is not None
        assert torch.equal(stack.bias, torch.cat((with_bias.bias, torch.zeros(3))))
        assert ValueStack({"b": without}).bias is None

    def test_names_the_layer_whose_activation_is_not_finite(self, pipe: StableDiffusionPipeline) -> None:
        layers = value_layers(pipe)
        with torch.no_grad():
            layers[MID].weight[2, 3] = float("nan")
        with pytest.raises(NemoError, match=rf"{MID}: the activations of these prompts are not finite"):
            ValueStack(layers).activations(torch.randn(1, 5, TEXT_WIDTH))


class TestEvaluating:
    def test_gives_every_modules_mode_back_also_after_an_exception(self, pipe: StableDiffusionPipeline) -> None:
        pipe.unet.train()
        pipe.unet.mid_block.eval()

        def interrupted() -> None:
            with evaluating(pipe):
                assert not any(module.training for module in pipe.unet.modules())
                assert not torch.is_grad_enabled()
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            interrupted()
        assert pipe.unet.training
        assert not pipe.unet.mid_block.resnets[0].training
        assert torch.is_grad_enabled()
