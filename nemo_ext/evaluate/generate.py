"""Generating images whose noise depends on their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from PIL.Image import Image


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
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        made = pipe(
            list(prompts[batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]],
            output_type="np",
        ).images
        if not np.isfinite(made).all():
            raise NemoError("the images hold NaN: the model overflows in this precision, use float32 (--dtype float32)")
        images += pipe.image_processor.numpy_to_pil(made)
    return images
