"""Generating images so that a seed alone decides the noise."""

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
    """One image for each prompt and its seed, with the pipeline's own scheduler.

    The noise is drawn on the CPU by a generator for each image, so a seed means the same image on every device and for
    any batch size, but for rounding.

    Args:
        pipe: a pipeline, with the neurons off that are off now.
        prompts: B texts.
        seeds: B seeds, one for each prompt.
        steps: denoising steps.
        guidance: classifier-free guidance.
        batch_size: images generated at once.

    Returns:
        B images, RGB.

    Raises:
        NemoError: an image holds NaN.
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
            raise NemoError("the images hold NaN: the model overflows in this precision, use --dtype float32")
        images += pipe.image_processor.numpy_to_pil(made)
    return images
