"""Loading a pipeline from a local diffusers folder.

The folder may come from an untrusted source. So weights are read from safetensors only, because opening a pickle can
run code, and the network is never used. Every error is one sentence that names the file and says what to do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import safetensors
import torch

from nemo_ext.errors import NemoError
from nemo_ext.models.family import Family
from nemo_ext.models.registry import FAMILIES, NO_CROSS_ATTENTION
from nemo_ext.models.text import skip_text_layers
from nemo_ext.reading import parse_json, refusing


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    clip_skip: int = 0,
    latent_size: tuple[int, int] | None = None,
) -> Any:
    """Load a pipeline of a known family from a local diffusers folder.

    Args:
        folder: a folder as a pipeline's `save_pretrained` writes it, with weights in safetensors. If it holds only
            weights of one variant (`*.fp16.safetensors`, `*.bf16.safetensors`), these are read.
        device: the device that the pipeline is moved to.
        dtype: the precision that its weights are converted to; float32 by default.
        clip_skip: the number of the text encoder's last layers that are not used (`skip_text_layers`).
        latent_size: height and width of the latents that it generates from, and that are measured; None: those that the
            folder says.

    Returns:
        The pipeline, without a safety checker and with its progress bars off.

    Raises:
        NemoError: the folder is missing, is not a pipeline of a known family, holds no safetensors, cannot be read,
            holds weights that are not finite, or its text encoder does not have so many layers.
    """
    folder = Path(folder)
    family = _family_in(folder)
    variant = _variant_in(folder, family)
    try:
        pipe = family.load(folder, variant, latent_size)
    except Exception as error:
        # diffusers and transformers raise anything from KeyError to SafetensorError for a damaged folder.
        reason = str(error) or type(error).__name__
        raise NemoError(f"the pipeline in {folder} can't be loaded: {reason}") from error
    # The dtype is converted here, because the argument for it has another name in every generation of diffusers.
    pipe = pipe.to(torch.device(device), dtype or torch.float32)
    for name in family.components:
        for key, parameter in getattr(pipe, name).named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NemoError(
                    f"the weights in {folder} aren't finite ({name}.{key} holds NaN or infinity): get an "
                    "undamaged copy, or load it in float32 if it overflowed in half precision"
                )
    skip_text_layers(pipe, clip_skip)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The precision in which the denoiser's weights are stored that `load_pipeline` reads from a folder."""
    folder = Path(folder)
    family = _family_in(folder)
    variant, component = _variant_in(folder, family), folder / family.components[0]
    file = min(file for file in component.glob("*.safetensors") if _variant_of(file.name) == variant)
    with safetensors.safe_open(file, framework="pt") as weights:
        dtype: torch.dtype = weights.get_tensor(min(weights.keys())).dtype
        return dtype


def _family_in(folder: Path) -> Family:
    """Find the family of the pipeline in a folder by the class that `model_index.json` names."""
    if not folder.exists():
        raise NemoError(f"the model folder {folder} doesn't exist: give the path of a diffusers folder")
    if not folder.is_dir():
        raise NemoError(
            f"{folder} is a file, not a diffusers folder: convert a single checkpoint with "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise NemoError(
            f"{folder} isn't a diffusers pipeline, it has no model_index.json: give the folder that holds "
            "unet/, text_encoder/, tokenizer/ and vae/"
        )
    with refusing(index, "can't be read as JSON"):
        description = parse_json(index.read_bytes())
    kind = description.get("_class_name") if isinstance(description, dict) else None
    for family in FAMILIES:
        if kind in family.pipeline_classes:
            return family
    if isinstance(description, dict) and "transformer" in description:
        raise NemoError(f"{folder} holds a {kind}: {NO_CROSS_ATTENTION}")
    known = " or ".join(f"a {family.pipeline_classes[0]} folder ({family.name})" for family in FAMILIES)
    raise NemoError(f"{folder} holds a {kind or 'pipeline without a class name'}: give {known}")


def _variant_in(folder: Path, family: Family) -> str | None:
    """The variant of the weights in a folder, such as "fp16" or "bf16"; None for plain names.

    Where a folder has several, plain names are taken first, then fp16.

    Raises:
        NemoError: a component is missing or has no safetensors, or the components are of different variants.
    """
    common: set[str | None] | None = None
    for name in family.components:
        component = folder / name
        if not component.is_dir():
            raise NemoError(f"{folder} isn't a whole pipeline, its folder {name}/ is missing: get it again")
        weights = sorted(file.name for file in component.glob("*.safetensors"))
        if not weights:
            pickles = sorted(file.name for file in component.glob("*.bin"))
            raise NemoError(
                f"{component} holds "
                + (f"{pickles[0]} but no safetensors" if pickles else "no weights")
                + ", and only safetensors are read because opening a pickle can run code: convert it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        own = {_variant_of(file) for file in weights}
        common = own if common is None else common & own
    if not common:
        raise NemoError(
            f"{folder} has some components only in one variant of their weights (such as *.fp16.safetensors) and "
            "others only in another: save all of them in the same way"
        )
    return min(common, key=lambda variant: (variant is not None, variant != "fp16", variant or ""))


def _variant_of(file: str) -> str | None:
    """The variant in the name of a file of weights: "fp16" for model.fp16.safetensors or model.fp16-00001-of-00002…"""
    parts = re.sub(r"-\d+-of-\d+", "", file.removesuffix(".safetensors")).split(".")
    return parts[1] if len(parts) > 1 else None
