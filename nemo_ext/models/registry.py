"""Finding the family of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.models.family import Family, unwrapped
from nemo_ext.models.stable_diffusion import StableDiffusion
from nemo_ext.models.stable_diffusion_xl import StableDiffusionXL

#: All families. A model belongs to the first one that recognizes it.
FAMILIES: list[Family] = [StableDiffusionXL(), StableDiffusion()]

#: Why transformers such as SD3's and FLUX's are not supported (docs/method.md, section 14).
NO_CROSS_ATTENTION = (
    "its denoiser is a transformer, in which the text changes in every block together with the image, so no activation "
    "depends on the text alone; models with a U-Net are supported"
)


def family_of(model: Any) -> Family:
    """The family of a pipeline or of its denoiser.

    Raises:
        NemoError: no family recognizes the model.
    """
    for family in FAMILIES:
        if family.recognizes(model):
            return family
    denoiser = getattr(model, "transformer", model)
    if "Transformer" in type(denoiser).__name__:
        raise NemoError(f"{type(model).__name__}: {NO_CROSS_ATTENTION}")
    raise NemoError(f"wanted a diffusers pipeline with a .unet, or a UNet2DConditionModel, got {type(model).__name__}")


def denoiser_of(model: Any) -> nn.Module:
    """The network of a pipeline that predicts the noise, without the wrappers that `unwrapped` removes.

    Args:
        model: a pipeline, or its denoiser, which is then returned itself.

    Raises:
        NemoError: no family recognizes the model.
    """
    return unwrapped(family_of(model).denoiser(model))


def short_layer_name(layer: str) -> str:
    """A value layer's name, short enough for a plot. A name that no family knows is returned unchanged."""
    names = (family.short_name(layer) for family in FAMILIES)
    return next((name for name in names if name is not None), layer)
