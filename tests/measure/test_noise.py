"""Noise differences: the latents of seeds, the first call of the denoiser, and what is refused."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.noise import initial_latents, noise_differences
from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.text import encode_prompts

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def scaled(difference: Tensor) -> Tensor:
    """Min-max scaling, one sample and channel after another."""
    planes = [(plane - plane.min()) / (plane.max() - plane.min()) for plane in difference.flatten(0, 1)]
    return torch.stack(planes).reshape(difference.shape)


class TestInitialLatents:
    def test_paper_each_seed_is_that_of_any_diffusers_pipeline(self, pipe: StableDiffusionPipeline) -> None:
        latents = initial_latents(pipe, 3, PAPER)
        for place, seed in enumerate((1, 2, 3)):
            generator = torch.Generator().manual_seed(seed)
            assert torch.equal(latents[place : place + 1], randn_tensor((1, 4, 16, 16), generator=generator))

    def test_paper_more_seeds_begin_with_the_same_ones(self, pipe: StableDiffusionPipeline) -> None:
        assert torch.equal(initial_latents(pipe, 5, PAPER)[:3], initial_latents(pipe, 3, PAPER))

    def test_published_code_draws_all_seeds_from_one_generator(self, pipe: StableDiffusionPipeline) -> None:
        expected = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(initial_latents(pipe, 3, PUBLISHED), expected)

    def test_inpainting_models_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(in_channels=9)
        with pytest.raises(NemoError, match="takes 9 channels and predicts 4: wanted a text-to-image model"):
            initial_latents(pipe, 2, PAPER)


class TestNoiseDifferences:
    @pytest.mark.parametrize(("protocol", "timestep"), [(PAPER, 981), (PUBLISHED, 961)])
    def test_are_predicted_noise_minus_latents_scaled(
        self, pipe: StableDiffusionPipeline, protocol: Protocol, timestep: int
    ) -> None:
        hidden = encode_prompts(pipe, ["a cat"])
        latents = initial_latents(pipe, 3, protocol)
        with torch.no_grad():
            noise = pipe.unet(latents, timestep, encoder_hidden_states=hidden.repeat(3, 1, 1)).sample
        expected = scaled(noise - latents)
        torch.testing.assert_close(noise_differences(pipe, hidden, latents, protocol), expected, rtol=1e-5, atol=1e-5)

    def test_v_prediction_is_converted_to_noise(self) -> None:
        """Salimans and Ho: v = √ᾱ ε − √(1−ᾱ) x₀ and x = √ᾱ x₀ + √(1−ᾱ) ε, so ε = √ᾱ v + √(1−ᾱ) x."""
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        hidden, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 2, PAPER)
        with torch.no_grad():
            v = pipe.unet(latents, 981, encoder_hidden_states=hidden.repeat(2, 1, 1)).sample
        alpha = pipe.scheduler.alphas_cumprod[981]
        expected = scaled(alpha.sqrt() * v + (1 - alpha).sqrt() * latents - latents)
        torch.testing.assert_close(noise_differences(pipe, hidden, latents, PAPER), expected, rtol=1e-4, atol=1e-4)

    def test_batch_size_changes_rounding_only(self, pipe: StableDiffusionPipeline) -> None:
        hidden, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 5, PAPER)
        whole = noise_differences(pipe, hidden, latents, PAPER, batch_size=5)
        for batch_size in (1, 2):
            parts = noise_differences(pipe, hidden, latents, PAPER, batch_size=batch_size)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)

    def test_guidance_goes_towards_the_empty_prompt(self, pipe: StableDiffusionPipeline) -> None:
        """The published threshold script's formula, with its halves swapped: ε(y) + g (ε("") − ε(y))."""
        hidden, empty = encode_prompts(pipe, ["a cat"]), encode_prompts(pipe, [""])
        latents = initial_latents(pipe, 2, PUBLISHED)
        with torch.no_grad():
            conditional = pipe.unet(latents, 961, encoder_hidden_states=hidden.repeat(2, 1, 1)).sample
            unconditional = pipe.unet(latents, 961, encoder_hidden_states=empty.repeat(2, 1, 1)).sample
        expected = scaled(conditional + 7 * (unconditional - conditional) - latents)
        guided = noise_differences(pipe, hidden, latents, PUBLISHED, guidance=(7.0, empty))
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)

    def test_channel_without_any_difference_is_zero(self) -> None:
        pipe = tiny_pipeline()
        torch.nn.init.zeros_(pipe.unet.conv_out.weight)
        latents = torch.zeros(1, 4, 16, 16)
        assert noise_differences(pipe, encode_prompts(pipe, ["a"]), latents, PAPER).abs().max() == 0

    def test_leave_no_trace(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.train()
        random_state = torch.get_rng_state()
        difference = noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)
        assert not difference.requires_grad
        assert torch.equal(torch.get_rng_state(), random_state)
        assert pipe.unet.training
        assert pipe.scheduler.num_inference_steps is None

    def test_noise_that_is_not_finite_names_the_seed(self, pipe: StableDiffusionPipeline) -> None:
        latents = initial_latents(pipe, 3, PAPER)
        latents[1, 0, 0, 0] = float("inf")
        with pytest.raises(NemoError, match=r"noise for seed 1 \(counted from 0\) is not finite: use float32"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), latents, PAPER)

    def test_other_predictions_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
        with pytest.raises(NemoError, match="must be epsilon or v_prediction, got sample"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)

    def test_unets_that_want_more_than_text_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(addition_embed_type="text_time")
        with pytest.raises(NemoError, match="addition_embed_type 'text_time', as in SDXL"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)
