"""Writes the trained parts as a folder of a StableDiffusionPipeline, and the training images."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from nemo_ext.demo.captions import TEMPLATES, VERBATIM

from .diffusion import TextToNoise, scheduler
from .drawing import draw_verbatim, template_variations


def save_pipeline(path: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: TextToNoise, log: Path) -> None:
    """Write the pipeline, with all weights rounded to float16, and the training log to the folder `path`.

    The text encoder is stored as float32. The reason is that transformers keeps the stored dtype when it loads, while
    diffusers loads the U-Net as float32, and `from_pretrained(path)` alone must return a pipeline that runs.
    """
    StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(), text_encoder=copy.deepcopy(model.text_encoder).half().float(),
        tokenizer=tokenizer, unet=_without_hooks(model).half(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    shutil.copy(log, path / "training-log.jsonl")


def _without_hooks(model: TextToNoise) -> torch.nn.Module:
    unet = copy.deepcopy(model.unet)
    for module in unet.modules():
        module._forward_hooks.clear()
    return unet


def save_originals(path: Path) -> None:
    """Write every memorized image to the folder `path`: NAME.png, or NAME-VARIATION.png for a template."""
    path.mkdir(parents=True, exist_ok=True)
    for what in VERBATIM:
        Image.fromarray(draw_verbatim(what)).save(path / f"{what.name}.png", optimize=True)
    for what in TEMPLATES:
        for variation, image in template_variations(what).items():
            Image.fromarray(image).save(path / f"{what.name}-{variation}.png", optimize=True)
