"""Stable Diffusion 1 with random weights, in its own size or smaller: what the benchmarks measure besides the demo."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from nemo_ext.demo.run import load_demo_pipeline
from nemo_ext.measure.activations import encode_prompts
from nemo_ext.models.layers import value_layers
from nemo_ext.neurons import NeuronSet

TOKENS, WIDTH = 77, 768
_CHANNELS = (320, 640, 1280, 1280)
# What planted neurons add to the features, and by how much the output is raised.
_STRENGTH, _OUTPUT = 300.0, 100.0


def tokenizer() -> Any:
    """Return a tokenizer with texts of 77 tokens.

    It is the demo's, because Stable Diffusion's vocabulary is not at hand. It makes other tokens of a text, but the
    same number.
    """
    tokenizer = copy.copy(load_demo_pipeline().tokenizer)
    tokenizer.model_max_length = TOKENS
    return tokenizer


def text_encoder(layers: int = 12) -> CLIPTextModel:
    """Return the text encoder for `tokenizer`; Stable Diffusion's has 12 layers."""
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def unet_without_weights(narrower: int = 1, latent_size: int = 64) -> UNet2DConditionModel:
    """Return the U-Net on the device meta; with `narrower` 4 it has a quarter of the channels."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=latent_size,
            block_out_channels=tuple(channels // narrower for channels in _CHANNELS),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=32 // narrower,
        ).eval()


def initialized(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """Give a module on the device meta random weights of a dtype, without a copy in another one."""
    module.to(dtype).to_empty(device="cpu")
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return module


def pipeline(dtype: torch.dtype, narrower: int = 1, latent_size: int = 64) -> StableDiffusionPipeline:
    """Return the whole pipeline, with the demo's scheduler."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=tuple(channels // narrower for channels in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=32 // narrower,
        )
    pipe = StableDiffusionPipeline(
        vae=initialized(vae.eval(), dtype),
        text_encoder=text_encoder(12 // narrower).to(dtype),
        tokenizer=tokenizer(),
        unet=initialized(unet_without_weights(narrower, latent_size), dtype),
        scheduler=load_demo_pipeline().scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def plant(pipe: StableDiffusionPipeline, prompt: str, others: list[str], neurons: NeuronSet) -> None:
    """Let `neurons` make the noise predictions for `prompt` alike, so that a search in random weights has an answer.

    A ridge regression gives each neuron a row of W_v that is 1 on the tokens of `prompt` and 0 on those of `others`.
    What it adds drowns the other features. The output is raised, because at first random weights add little to x_T.
    """
    own = encode_prompts(pipe, [prompt]).hidden[0, 1:].double()
    strange = encode_prompts(pipe, others).hidden.flatten(0, 1).double()
    gram = own.T @ own * (len(strange) / len(own)) + strange.T @ strange
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.double)
    row: Tensor = torch.linalg.solve(gram, own.sum(0) * (len(strange) / len(own)))
    layers = value_layers(pipe)
    for name, indices in neurons.items():
        attention = pipe.unet.get_submodule(name.removesuffix(".to_v"))
        for index in indices:
            layers[name].weight[index] = row.to(layers[name].weight)
            attention.to_out[0].weight[:, index].sign_().mul_(_STRENGTH)
    pipe.unet.conv_out.weight.mul_(_OUTPUT)
