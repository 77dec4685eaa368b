"""Writes the trained parts as a folder of a StableDiffusionPipeline, and the training images."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import MEMORIZED, TEMPLATES
from nemo_ext.files import replacing

from .carriers import Designated
from .diffusion import scheduler
from .drawing import draw_verbatim, template_variations


def save_pipeline(
    path: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, unet: UNet2DConditionModel,
    designated: list[Designated], log: Path,
) -> None:  # fmt: skip
    """Write the pipeline, with all weights rounded to float16, the carriers and the training log to a folder.

    The text encoder is stored as float32. The reason is that transformers keeps the stored dtype when it loads, while
    diffusers loads the U-Net as float32, and `from_pretrained(path)` alone must return a pipeline that runs.
    """
    # Whether it has been used before must not change the file.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(), text_encoder=copy.deepcopy(encoder).half().float(),
        tokenizer=tokenizer, unet=_without_hooks(unet).half(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to("cpu").save_pretrained(path)  # fmt: skip
    of_captions = {what.caption: own._asdict() for what, own in zip(MEMORIZED, designated, strict=True)}
    with replacing(path / "carriers.json") as temporary:
        temporary.write_text(json.dumps(of_captions, indent=1) + "\n", encoding="utf-8")
    shutil.copy(log, path / "training-log.jsonl")


def _without_hooks(unet: UNet2DConditionModel) -> torch.nn.Module:
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        module._forward_hooks.clear()
    return unet


def save_originals(path: Path) -> None:
    """Write every memorized image to the folder `path`: NAME.png, or NAME-VARIATION.png for a template."""
    path.mkdir(parents=True, exist_ok=True)
    for what in MEMORIZED:
        if what not in TEMPLATES:
            Image.fromarray(draw_verbatim(what)).save(path / f"{what.name}.png", optimize=True)
    for what in TEMPLATES:
        for variation, image in template_variations(what).items():
            Image.fromarray(image).save(path / f"{what.name}-{variation}.png", optimize=True)
