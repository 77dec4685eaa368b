"""Stable Diffusion XL: what it has more than Stable Diffusion 1. The whole method runs in test_pipelines.py."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from tiny_pipeline import TEXT_WIDTH, TOKENS, tiny_pipeline, tiny_xl_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure.noise import initial_latents, noise_differences, scaled
from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.layers import value_layers
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.registry import family_of, short_layer_name
from nemo_ext.models.stable_diffusion import StableDiffusion
from nemo_ext.models.stable_diffusion_xl import StableDiffusionXL
from nemo_ext.models.state import model_fingerprint
from nemo_ext.models.text import encode_prompts, skip_text_layers
from nemo_ext.patching.patch import patched

PAPER = Protocol.paper()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return tiny_xl_pipeline()


def test_is_told_from_stable_diffusion_1_with_and_without_its_pipeline(pipe: StableDiffusionXLPipeline) -> None:
    for model in (pipe, pipe.unet, torch.compile(pipe.unet)):
        assert type(family_of(model)) is StableDiffusionXL
    assert type(family_of(tiny_pipeline())) is StableDiffusion


def test_value_layers_of_every_transformer_block_are_found_in_network_order(pipe: StableDiffusionXLPipeline) -> None:
    layers = list(value_layers(pipe))
    assert [short_layer_name(layer) for layer in layers] == [
        "down 1.0", "down 1.0.1", "down 1.1", "down 1.1.1",
        "down 2.0", "down 2.0.1", "down 2.0.2", "down 2.1", "down 2.1.1", "down 2.1.2",
        "mid", "mid 0.1", "mid 0.2",
    ]  # fmt: skip
    assert {layer.in_features for layer in value_layers(pipe, "all").values()} == {3 * TEXT_WIDTH}


def test_text_is_the_pipelines_own_with_its_pooled_embedding(pipe: StableDiffusionXLPipeline) -> None:
    text = encode_prompts(pipe, ["a cat", "two dogs"])
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(
            ["a cat", "two dogs"], device="cpu", do_classifier_free_guidance=False
        )
    assert text.hidden.shape == (2, TOKENS, 3 * TEXT_WIDTH)
    assert torch.equal(text.hidden, hidden)
    assert text.pooled is not None
    assert torch.equal(text.pooled, pooled)
    with pytest.warns(UserWarning, match=f"cut to {TOKENS} tokens"):
        encode_prompts(pipe, ["a" * (2 * TOKENS)])


def test_noise_is_that_of_the_first_call_of_the_pipeline(pipe: StableDiffusionXLPipeline) -> None:
    """The pipeline samples by DDIM here, whose latents at the first step are the noise itself."""
    calls: list[tuple[torch.Tensor, int, dict[str, object]]] = []
    outputs: list[torch.Tensor] = []
    sampler = StableDiffusionXLPipeline(
        **{name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")},
        add_watermarker=False,
    )
    sampler.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    before = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], int(args[1]), kwargs)), with_kwargs=True
    )
    after = pipe.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    sampler("a cat", num_inference_steps=50, guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
            output_type="latent", callback_on_step_end=_stop)  # fmt: skip
    before.remove()
    after.remove()
    latents = initial_latents(pipe, 2, PAPER)
    assert calls[0][1] == 981
    assert torch.equal(calls[0][0], latents[:1])
    ours = noise_differences(pipe, encode_prompts(pipe, ["a cat"]), latents, PAPER)
    torch.testing.assert_close(ours[:1], scaled(outputs[0] - latents[:1]), rtol=1e-4, atol=1e-4)


def _stop(pipe: StableDiffusionXLPipeline, step: int, timestep: int, values: dict[str, object]) -> dict[str, object]:
    pipe._interrupt = True
    return values


def test_the_pooled_embedding_stays_on_with_all_value_neurons_off(pipe: StableDiffusionXLPipeline) -> None:
    latents = initial_latents(pipe, 2, PAPER)
    everything = {layer: range(module.out_features) for layer, module in value_layers(pipe, "all").items()}
    with patched(pipe, everything):
        one, other = (noise_differences(pipe, encode_prompts(pipe, [text]), latents, PAPER) for text in ("cat", "dog"))
    assert not torch.equal(one, other)


def test_the_fingerprint_covers_both_text_encoders(pipe: StableDiffusionXLPipeline) -> None:
    changed = tiny_xl_pipeline()
    assert model_fingerprint(changed) == model_fingerprint(pipe)
    with torch.no_grad():
        changed.text_encoder_2.text_projection.weight[0, 0] += 1
    assert model_fingerprint(changed) != model_fingerprint(pipe)


def test_a_refiner_is_refused_by_name() -> None:
    refiner = tiny_xl_pipeline()
    refiner.text_encoder = None
    with pytest.raises(NemoError, match="lacks one of its two text encoders, as the refiner does"):
        encode_prompts(refiner, ["a cat"])


def test_clip_skip_is_refused(pipe: StableDiffusionXLPipeline) -> None:
    with pytest.raises(NemoError, match="clip_skip is for models with one text encoder"):
        skip_text_layers(pipe, 1)


class TestTransformers:
    """SD3, FLUX and others: refused by name, with the reason."""

    def test_in_memory(self) -> None:
        class SomeTransformer2DModel(torch.nn.Module):
            pass

        class SomePipeline:
            transformer = SomeTransformer2DModel()

        for model in (SomePipeline(), SomePipeline.transformer):
            with pytest.raises(NemoError, match=rf"{type(model).__name__}: its denoiser is a transformer"):
                family_of(model)

    @pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
    def test_in_a_folder(self, name: str, tmp_path: Path) -> None:
        index = {"_class_name": name, "transformer": ["diffusers", "SomeTransformer2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(NemoError, match=f"holds a {name}: its denoiser is a transformer"):
            load_pipeline(tmp_path)
