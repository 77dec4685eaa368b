"""Noise differences: the latents of seeds, the first call of the denoiser, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.noise import initial_latents, noise_differences, scaled
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import memorization_score
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.text import encode_prompts

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def scaled_by_hand(difference: Tensor) -> Tensor:
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

    def test_unets_that_take_other_images_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(in_channels=8)
        with pytest.raises(NemoError, match="takes 8 channels and predicts 4: wanted a model for text-to-image"):
            initial_latents(pipe, 2, PAPER)


class TestNoiseDifferences:
    @pytest.mark.parametrize(("protocol", "timestep"), [(PAPER, 981), (PUBLISHED, 961)])
    def test_are_predicted_noise_minus_latents_scaled(
        self, pipe: StableDiffusionPipeline, protocol: Protocol, timestep: int
    ) -> None:
        text = encode_prompts(pipe, ["a cat"])
        latents = initial_latents(pipe, 3, protocol)
        with torch.no_grad():
            noise = pipe.unet(latents, timestep, encoder_hidden_states=text.hidden.repeat(3, 1, 1)).sample
        expected = scaled_by_hand(noise - latents)
        torch.testing.assert_close(noise_differences(pipe, text, latents, protocol), expected, rtol=1e-5, atol=1e-5)

    def test_v_prediction_is_converted_to_noise(self) -> None:
        """Salimans and Ho: v = √ᾱ ε − √(1−ᾱ) x₀ and x = √ᾱ x₀ + √(1−ᾱ) ε, so ε = √ᾱ v + √(1−ᾱ) x."""
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        text, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 2, PAPER)
        with torch.no_grad():
            v = pipe.unet(latents, 981, encoder_hidden_states=text.hidden.repeat(2, 1, 1)).sample
        alpha = pipe.scheduler.alphas_cumprod[981]
        expected = scaled_by_hand(alpha.sqrt() * v + (1 - alpha).sqrt() * latents - latents)
        torch.testing.assert_close(noise_differences(pipe, text, latents, PAPER), expected, rtol=1e-4, atol=1e-4)

    def test_batch_size_changes_rounding_only(self, pipe: StableDiffusionPipeline) -> None:
        text, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 5, PAPER)
        whole = noise_differences(pipe, text, latents, PAPER, batch_size=5)
        for batch_size in (1, 2):
            parts = noise_differences(pipe, text, latents, PAPER, batch_size=batch_size)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)

    def test_guidance_goes_towards_the_empty_prompt(self, pipe: StableDiffusionPipeline) -> None:
        """The published threshold script's formula, with its halves swapped: ε(y) + g (ε("") − ε(y))."""
        text, empty = encode_prompts(pipe, ["a cat"]), encode_prompts(pipe, [""])
        latents = initial_latents(pipe, 2, PUBLISHED)
        with torch.no_grad():
            conditional = pipe.unet(latents, 961, encoder_hidden_states=text.hidden.repeat(2, 1, 1)).sample
            unconditional = pipe.unet(latents, 961, encoder_hidden_states=empty.hidden.repeat(2, 1, 1)).sample
        expected = scaled_by_hand(conditional + 7 * (unconditional - conditional) - latents)
        guided = noise_differences(pipe, text, latents, PUBLISHED, guidance=(7.0, empty))
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("constant", [slice(None), slice(2, 3)])
    def test_channel_that_is_the_same_everywhere_is_refused(self, constant: slice) -> None:
        difference = torch.randn(2, 4, 16, 16)
        difference[1, constant] = 0.25
        with pytest.raises(
            NemoError, match=rf"noise of seed 1 .* in channel {constant.start or 0}, so there is nothing"
        ):
            scaled(difference)

    def test_zero_terminal_snr_is_refused_where_the_latents_are_noise_alone(self) -> None:
        """Lin et al., arXiv 2305.08891: ᾱ is 0 at the last timestep, where ε = x whatever v is."""
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        text, latents = encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER)
        with pytest.raises(NemoError, match=r"step 0 of 50 .* noise alone .* Protocol\(step_index=1\)"):
            noise_differences(pipe, text, latents, PAPER)
        noise_differences(pipe, text, latents, replace(PAPER, step_index=1))

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

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("addition_embed_type", "image", "added conditioning of another kind than SDXL's"),
            ("encoder_hid_dim_type", "ip_image_proj", r"for an IP-Adapter call pipe.unload_ip_adapter\(\)"),
            ("class_embed_type", "timestep", "embeddings of classes"),
            ("num_class_embeds", 10, "class labels"),
            ("time_cond_proj_dim", 16, "an embedding of the guidance scale"),
        ],
    )
    def test_unets_that_want_more_than_text_are_refused(self, name: str, value: object, said: str) -> None:
        pipe = tiny_pipeline()
        text, latents = encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER)
        pipe.unet.register_to_config(**{name: value})
        with pytest.raises(NemoError, match=rf"{said}.* \({name} is {value!r}\)"):
            noise_differences(pipe, text, latents, PAPER)

    def test_a_loaded_ip_adapter_is_refused_and_unloaded_it_is_not(self) -> None:
        pipe = tiny_pipeline()
        wanted = memorization_score(pipe, "a cat", seeds=2).pairs
        load_ip_adapter(pipe)
        with pytest.raises(NemoError, match="for an IP-Adapter call"):
            memorization_score(pipe, "a cat", seeds=2)
        pipe.unload_ip_adapter()
        assert torch.equal(memorization_score(pipe, "a cat", seeds=2).pairs, wanted)


class TestSizes:
    """The latents that are measured are those that the pipeline generates from."""

    def test_sides_can_differ(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(sample_size=[16, 24])
        assert initial_latents(pipe, 2, PAPER).shape == (2, 4, 16, 24)
        assert memorization_score(pipe, "a cat", seeds=2).max < 1

    def test_none_at_all_is_refused_with_what_to_do(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(sample_size=None)
        with pytest.raises(NemoError, match=r"sample_size is None\): set it, for example pipe.unet.register_to_config"):
            memorization_score(pipe, "a cat", seeds=2)

    def test_others_are_chosen_when_loading_and_are_also_those_of_images(self, tmp_path: Path) -> None:
        tiny_pipeline().save_pretrained(tmp_path)
        pipe = load_pipeline(tmp_path, latent_size=(16, 24))
        assert initial_latents(pipe, 2, PAPER).shape == (2, 4, 16, 24)
        made = pipe("a cat", num_inference_steps=1, output_type="latent").images
        assert made.shape == (1, 4, 16, 24)


def load_ip_adapter(pipe: StableDiffusionPipeline) -> None:
    """Do to the U-Net what `pipe.load_ip_adapter` does, with random weights."""
    unet, wide = pipe.unet, pipe.unet.config.cross_attention_dim
    adapter, key = {}, 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_v.out_features
            adapter |= {f"{key}.to_{x}_ip.weight": 0.02 * torch.randn(out, wide) for x in "kv"}
            key += 2
    image = {
        "proj.weight": torch.randn(4 * wide, 8), "proj.bias": torch.zeros(4 * wide),
        "norm.weight": torch.ones(wide), "norm.bias": torch.zeros(wide),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": adapter}])
