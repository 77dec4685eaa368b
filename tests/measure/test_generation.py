"""Images for comparison: which depend on their seed alone, and which leave the pipeline as it was."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from tiny_pipeline import tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling, default_guidance, sample_images, sampler_of

PROMPT = "a red cat"


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def pixels(pipe: StableDiffusionPipeline, sampling: Sampling, batch_size: int = 8) -> list[bytes]:
    images = sample_images(sampler_of(pipe), PROMPT, sampling, sampling.all_seeds, batch_size=batch_size)
    return [image.tobytes() for image in images]


class TestSampling:
    def test_takes_the_guidance_of_the_pipeline(self, pipe: StableDiffusionPipeline) -> None:
        assert default_guidance(pipe) == 7.5
        assert Sampling().resolved(pipe).guidance == 7.5
        assert Sampling(guidance=2).resolved(pipe).guidance == 2.0

    def test_a_pipeline_without_a_default_needs_a_number(self) -> None:
        class Pipeline:
            def __call__(self, prompt: str, guidance_scale: float) -> None: ...

        with pytest.raises(NemoError, match="Pipeline has no default for guidance_scale: give the guidance"):
            Sampling().resolved(Pipeline())

    def test_counts_guided_steps_twice(self) -> None:
        assert Sampling(steps=10, guidance=3.0).unet_samples(4) == 80
        assert Sampling(steps=10, guidance=1.0).unet_samples(4) == 40

    @pytest.mark.parametrize(("settings", "message"), [({"seeds": 1}, "2 or more, got 1"), ({"steps": 0}, "got 0")])
    def test_that_compares_nothing_is_refused(self, settings: dict[str, int], message: str) -> None:
        with pytest.raises(NemoError, match=message):
            Sampling(**settings)


class TestImages:
    def test_do_not_depend_on_the_batch(self, pipe: StableDiffusionPipeline) -> None:
        sampling = Sampling(seeds=3, steps=2, guidance=2.0)
        one, many = (pixels(pipe, sampling, batch_size) for batch_size in (1, 6))
        for first, second in zip(one, many, strict=True):
            difference = np.frombuffer(first, "u1").astype(int) - np.frombuffer(second, "u1").astype(int)
            assert abs(difference).max() <= 1
        assert len(set(one)) == 3

    def test_do_not_depend_on_the_scheduler_and_leave_it_alone(self, pipe: StableDiffusionPipeline) -> None:
        sampling = Sampling(seeds=2, steps=2, guidance=1.0)
        expected = pixels(pipe, sampling)
        pipe.scheduler = scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(desc="mine")
        assert pixels(pipe, sampling) == expected
        assert pipe.scheduler is scheduler
        assert pipe.config["scheduler"][1] == "EulerDiscreteScheduler"
        assert pipe._progress_bar_config == {"desc": "mine"}

    def test_leave_the_global_random_state_alone(self, pipe: StableDiffusionPipeline) -> None:
        state = torch.get_rng_state()
        pixels(pipe, Sampling(seeds=2, steps=1, guidance=1.0))
        assert torch.equal(torch.get_rng_state(), state)

    def test_that_are_not_finite_are_refused(self, pipe: StableDiffusionPipeline) -> None:
        with torch.no_grad():
            pipe.vae.post_quant_conv.bias.fill_(torch.nan)
        with pytest.raises(NemoError, match="the images hold NaN"):
            pixels(pipe, Sampling(seeds=2, steps=1, guidance=1.0))
