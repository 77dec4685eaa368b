"""What "switched off" means, without nemo_ext: rows of weights set to zero, and the noise that comes of it."""

import copy
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import TEXT_WIDTH, TOKENS
from torch import Tensor

from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import denoiser_of
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import PatchHandle


def noise(pipe: StableDiffusionPipeline) -> Tensor:
    """The U-Net's output on fixed input, in the U-Net's dtype."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator).to(pipe.unet.dtype)
    hidden = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator).to(pipe.unet.dtype)
    with torch.no_grad():
        return pipe.unet(latents, 981, encoder_hidden_states=hidden, return_dict=False)[0]


def with_rows_zeroed(pipe: StableDiffusionPipeline, neurons: NeuronSet) -> StableDiffusionPipeline:
    """A copy whose neurons are switched off in the weights: the meaning of "off", without nemo_ext."""
    copied = copy.deepcopy(pipe)
    with torch.no_grad():
        for layer, indices in neurons.items():
            value_layer = copied.unet.get_submodule(layer)
            value_layer.weight[list(indices)] = 0
            if value_layer.bias is not None:
                value_layer.bias[list(indices)] = 0
    return copied


def handle_of(model: Any) -> PatchHandle:
    """The handle of a pipeline or U-Net that was patched somewhere else."""
    return PatchHandle(value_layers(model, "all"), denoiser_of(model))
