"""Generating images whose noise depends on their seed alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_ext.errors import NemoError
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating
from nemo_ext.reading import PositiveCount, Seed, restored

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sampling:
    """How the images are generated that are compared with each other (docs/method.md, section 12).

    The scheduler is the one that the pipeline's family samples with in few steps; for Stable Diffusion it is DDIM with
    the noise levels of the pipeline's own scheduler.

    Attributes:
        seeds: the number of images of a prompt, 2 or more.
        first_seed: the seed of the first image; the others have the next whole numbers.
        steps: the number of denoising steps.
        guidance: the scale of classifier-free guidance; None: the default of the pipeline's `__call__`.
    """

    seeds: PositiveCount = 4
    first_seed: Seed = 1
    steps: PositiveCount = 25
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise NemoError(f"images of different seeds are compared: wanted seeds of 2 or more, got {self.seeds}")
        if self.steps < 1:
            raise NemoError(f"steps must be 1 or more, got {self.steps}")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all images."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    def resolved(self, pipe: Any) -> Sampling:
        """The same sampling with the guidance as a number, which may come from the pipeline."""
        guidance = default_guidance(pipe) if self.guidance is None else float(self.guidance)
        return Sampling(self.seeds, self.first_seed, self.steps, guidance)

    def unet_samples(self, images: int) -> int:
        """The number of latents that the denoiser evaluates for some images: with guidance above 1 each step takes two.

        The guidance must be a number (`resolved`).
        """
        assert self.guidance is not None
        return images * self.steps * (2 if self.guidance > 1 else 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        """Make a sampling from a dictionary of `to_dict`.

        Raises:
            NemoError: a field is unknown, or has a value of another type or out of range.
        """
        return restored(cls, values)


def default_guidance(pipe: Any) -> float:
    """The scale of guidance with which a pipeline generates if none is given.

    Raises:
        NemoError: the pipeline's `__call__` has no default for `guidance_scale`.
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    if parameter is None or not isinstance(parameter.default, (int, float)):
        raise NemoError(f"{type(pipe).__name__} has no default for guidance_scale: give the guidance as a number")
    return float(parameter.default)


def sampler_of(pipe: Any) -> Any:
    """A copy of a pipeline for sampling in few steps, with a scheduler of its own and without a progress bar.

    The copy shares the pipeline's models, so neurons that a patch has switched off are off in the copy too. The
    pipeline itself stays as it is.
    """
    sampler = copy.copy(family_of(pipe).text_to_image(pipe))
    sampler.scheduler = family_of(pipe).sampling_scheduler(pipe)
    sampler.set_progress_bar_config(disable=True)
    return sampler


def generate_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int,
) -> list[Image]:
    """Generate one image for each pair of a prompt and a seed, with the pipeline's own scheduler.

    Each image has a random generator of its own on the CPU, so a seed gives the same image on every device and with any
    batch size, up to rounding.

    Args:
        pipe: a pipeline. Neurons that a patch has switched off stay off.
        prompts: B texts.
        seeds: B seeds, one for each prompt.
        steps: the number of denoising steps.
        guidance: the scale of classifier-free guidance.
        batch_size: the number of images in one call of the pipeline.

    Returns:
        B images, RGB.

    Raises:
        NemoError: the images are not finite.
    """
    images: list[Image] = []
    others = family_of(pipe).generation_arguments(pipe)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        with evaluating(pipe):
            made = pipe(
                list(prompts[batch]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]],
                output_type="np",
                **others,
            ).images
        if not np.isfinite(made).all():
            raise NemoError("the images hold NaN: the model overflows in this precision, use float32 (--dtype float32)")
        images += pipe.image_processor.numpy_to_pil(made)
    return images


def sample_images(
    sampler: Any, prompt: str, sampling: Sampling, seeds: Sequence[int], *, batch_size: int
) -> list[Image]:
    """Generate images of one prompt for comparison, one for each seed.

    Args:
        sampler: a pipeline from `sampler_of`. Neurons that a patch has switched off stay off.
        prompt: the text.
        sampling: how the images are generated, with the guidance as a number (`Sampling.resolved`).
        seeds: the seeds of the images.
        batch_size: the number of latents in one call of the denoiser; with guidance each image takes two.

    Returns:
        One RGB image for each seed.

    Raises:
        NemoError: the images are not finite.
    """
    assert sampling.guidance is not None
    rows_of_an_image = sampling.unet_samples(1) // sampling.steps
    return generate_images(
        sampler,
        [prompt] * len(seeds),
        seeds,
        steps=sampling.steps,
        guidance=sampling.guidance,
        batch_size=max(1, batch_size // rows_of_an_image),
    )
