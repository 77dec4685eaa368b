"""Small real pipelines for the tests: one with random weights, one whose memorizing neurons are known.

Both are `StableDiffusionPipeline`s of diffusers' and transformers' own classes, with Stable Diffusion
1's seven cross-attentions in the down and mid blocks, on 16×16 latents.
"""

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nemo_ext.neurons import NeuronSet

TEXT_WIDTH = 32
TOKENS = 32
CHANNELS = (16, 16, 32, 32)
#: The seven layers that the paper searches, in network order, and how many neurons each has here.
DOWN_AND_MID = {
    **{
        f"down_blocks.{block}.attentions.{attention}.transformer_blocks.0.attn2.to_v": CHANNELS[block]
        for block in range(3)
        for attention in range(2)
    },
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": CHANNELS[3],
}


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that reads letters: one token for each, at most 30 of them."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def tiny_pipeline(seed: int = 0, *, text_in_up_blocks: bool = False, in_channels: int = 4) -> StableDiffusionPipeline:
    """A pipeline with random weights; equal seeds give equal weights, and the global seed is left alone.

    With `text_in_up_blocks` the up blocks have the nine cross-attentions of Stable Diffusion 1. With 9 `in_channels`
    the U-Net is one for inpainting.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=in_channels,
            block_out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + (("CrossAttnUpBlock2D" if text_in_up_blocks else "UpBlock2D"),) * 3,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = _tiny_autoencoder()
        text_encoder = CLIPTextModel(_text_config(tokenizer))
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipeline(seed: int = 0, *, in_channels: int = 4) -> StableDiffusionXLPipeline:
    """A pipeline with Stable Diffusion XL's topology and random weights.

    Text enters in the second and third blocks, with two and three transformer blocks for each attention; there are two
    text encoders of different widths, and added conditioning.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=in_channels,
            block_out_channels=(16, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            cross_attention_dim=3 * TEXT_WIDTH,
            attention_head_dim=(2, 2, 4),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 2 * TEXT_WIDTH,
            norm_num_groups=4,
        )
        vae = _tiny_autoencoder()
        first = CLIPTextModel(_text_config(tokenizer))
        wide = {"hidden_size": 2 * TEXT_WIDTH, "projection_dim": 2 * TEXT_WIDTH}
        second = CLIPTextModelWithProjection(_text_config(tokenizer, **wide))
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=first.eval(),
        text_encoder_2=second.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def _text_config(tokenizer: CLIPTokenizer, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"hidden_size": TEXT_WIDTH, **more},
    )


@dataclass(frozen=True)
class Planted:
    """A pipeline that replicates one pattern, and the neurons that make it do so."""

    pipe: StableDiffusionPipeline
    #: Has a "z", so the pattern comes.
    memorized_prompt: str
    #: Have none.
    ordinary_prompts: tuple[str, ...]
    #: Any one of these brings the pattern, so all of them have to be off, and nothing else.
    neurons: NeuronSet
    #: Fire at a "z" just as hard, and nothing reads them.
    decoys: NeuronSet


def planted_pipeline() -> Planted:
    """A pipeline whose noise difference is −x_T, seed by seed another, but for prompts with a "z".

    A "z" alone has a part along the last text feature. The planted neurons read that feature and write
    it to four channels, the carriers, that go straight through the U-Net: everything else that could
    change them is set to zero. On their way up, zero padding turns the constant that they hold into a
    pattern, and the last normalization brings any large constant to the same size. What the other
    neurons write is too small to matter.
    """
    pipe = tiny_pipeline()
    layers = list(DOWN_AND_MID)
    neurons = NeuronSet({layers[1]: [3], layers[4]: [0, 9], layers[6]: [31]})
    decoys = NeuronSet({layers[0]: [7], layers[4]: [1, 2], layers[6]: [0, 30]})
    with torch.no_grad():
        _let_only_z_reach_the_last_feature(pipe.text_encoder, pipe.tokenizer)
        _let_constants_through_as_a_pattern(pipe.unet)
        for layer, index in (neurons | decoys).pairs():
            value_layer = pipe.unet.get_submodule(layer)
            value_layer.weight[index] = 0
            value_layer.weight[index, -1] = 1
        for layer, index in neurons.pairs():
            pipe.unet.get_submodule(layer.replace("to_v", "to_out.0")).weight[:4, index] = 1000
        for layer, index in decoys.pairs():
            pipe.unet.get_submodule(layer.replace("to_v", "to_out.0")).weight[:, index] = 0
    return Planted(
        pipe=pipe,
        memorized_prompt="a zebra on ice",
        ordinary_prompts=tuple(
            f"{count} {colour} {thing}"
            for count in ("one", "two", "three", "four")
            for colour in ("red", "blue", "green")
            for thing in ("cats", "dogs")
        ),
        neurons=neurons,
        decoys=decoys,
    )


def _let_only_z_reach_the_last_feature(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    for name, module in text_encoder.named_modules():
        if name.endswith(("self_attn.out_proj", "mlp.fc2")):
            _zero(module)  # the hidden states are the embeddings, normalized
    for name, parameter in text_encoder.named_parameters():
        if "embedding" in name:
            # Zero mean and zero in the last two features: so the final normalization keeps the zeros.
            parameter[:, -2:] = 0
            parameter[:, :-2] -= parameter[:, :-2].mean(1, keepdim=True)
            if "token" in name:
                for token in tokenizer.convert_tokens_to_ids(["z", "z</w>"]):
                    parameter[token, -2:] = torch.tensor([-1.0, 1.0])


def _let_constants_through_as_a_pattern(unet: UNet2DConditionModel) -> None:
    carriers = range(4)
    _zero(unet.conv_in)
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
            if module.conv_shortcut is not None:
                _zero(module.conv_shortcut)
                for c in carriers:
                    module.conv_shortcut.weight[c, c] = 1
        elif isinstance(module, Transformer2DModel):
            _zero(module.proj_in)
            _zero(module.proj_out)
            for c in carriers:
                module.proj_out.weight[c, c] = 1
            block = module.transformer_blocks[0]
            for part in (block.attn1.to_out[0], block.ff.net[2]):
                _zero(part)
            nn.init.zeros_(block.attn2.to_out[0].bias)
            block.attn2.to_out[0].weight.mul_(1e-3)
        elif name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            _zero(module)
            corners = ((0, 0), (0, 2), (2, 0), (2, 2))
            for c in carriers:
                row, column = (1, 1) if "down" in name else corners[c]
                module.weight[c, c, row, column] = 1
    unet.conv_norm_out.eps = 1.0  # what is much smaller than 1 stays small
    _zero(unet.conv_out)
    for c in carriers:
        unet.conv_out.weight[c, c, 1, 1] = 100


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
