"""Attention over tokens: its entropy, and observing it without changing the denoiser."""

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from nemo_ext.evaluate.attention import (
    attention_entropy,
    cross_attention_names,
    recorded_attention,
    token_attention,
)
from nemo_ext.models.text import encode_prompts


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(text_in_up_blocks=True)


def call(pipe: StableDiffusionPipeline, prompt: str = "a cat") -> Tensor:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        noise: Tensor = pipe.unet(
            latents, 981, encoder_hidden_states=encode_prompts(pipe, [prompt]).hidden.repeat(2, 1, 1)
        ).sample
    return noise


def test_entropy_of_uniform_attention_is_the_logarithm_of_the_number_of_tokens() -> None:
    assert attention_entropy(torch.full((3, 7), 1 / 7)).tolist() == pytest.approx([math.log(7)] * 3)


def test_entropy_of_attention_to_one_token_is_0() -> None:
    assert attention_entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0


def test_entropy_is_minus_the_sum_of_p_log_p() -> None:
    assert attention_entropy(torch.tensor([0.5, 0.25, 0.25])).item() == pytest.approx(1.5 * math.log(2))


def test_token_attention_is_the_mean_of_the_softmax_over_heads_and_positions() -> None:
    """Two heads of width 1 and two positions. Head 0 prefers token 0 by a factor of 3, in one position; head 1 is 0."""
    query = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    key = torch.tensor([[[2 * math.log(3), 5.0], [0.0, -5.0]]])
    expected = [(3 / 4 + 1 / 2 + 1 / 2 + 1 / 2) / 4, (1 / 4 + 1 / 2 + 1 / 2 + 1 / 2) / 4]
    assert token_attention(query, key, heads=2, scale=0.5)[0].tolist() == pytest.approx(expected)


def test_the_attention_of_every_cross_attention_is_that_of_diffusers(pipe: StableDiffusionPipeline) -> None:
    """diffusers' plain processor computes the probabilities with `get_attention_scores`, which is observed here."""
    with recorded_attention(pipe) as recorded:
        call(pipe)
    expected: dict[str, Tensor] = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(AttnProcessor())

            def observed(
                *arguments: Any, _name: str = name, _heads: int = module.heads, _of: Any = module.get_attention_scores
            ) -> Tensor:
                probabilities: Tensor = _of(*arguments)
                expected[_name] = probabilities.unflatten(0, (-1, _heads)).mean((1, 2))
                return probabilities

            module.get_attention_scores = observed
    call(pipe)
    assert list(recorded) == list(cross_attention_names(pipe))
    assert len(expected) == len(recorded) == 16
    for name, (attention,) in recorded.items():
        torch.testing.assert_close(attention, expected[name], rtol=1e-5, atol=1e-6)


def test_the_denoiser_returns_the_same_bits(pipe: StableDiffusionPipeline) -> None:
    plain = call(pipe)
    with recorded_attention(pipe):
        assert torch.equal(call(pipe), plain)


def test_all_forwards_are_restored_after_an_exception(pipe: StableDiffusionPipeline) -> None:
    def fail() -> None:
        assert any("forward" in vars(module) for module in pipe.unet.modules())
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"), recorded_attention(pipe):
        fail()
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_each_call_is_recorded(pipe: StableDiffusionPipeline) -> None:
    with recorded_attention(pipe) as recorded:
        call(pipe, "a cat")
        call(pipe, "two dogs")
    for first, second in recorded.values():
        assert first.shape == second.shape == (2, 32)
        assert not torch.equal(first, second)


def test_masked_attention_is_not_recorded(pipe: StableDiffusionPipeline) -> None:
    name = cross_attention_names(pipe)[0]
    attention = pipe.unet.get_submodule(name)
    sheet, text = torch.zeros(1, 9, 16), encode_prompts(pipe, ["a cat"]).hidden
    with torch.no_grad(), recorded_attention(pipe) as recorded:
        attention(sheet, encoder_hidden_states=text, attention_mask=torch.zeros(1, 1, 32))
        assert not recorded
        attention(sheet, encoder_hidden_states=text)
        assert list(recorded) == [name]


def test_fused_projections_are_not_recorded(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.fuse_qkv_projections()
    with recorded_attention(pipe) as recorded:
        call(pipe)
    assert not recorded
