"""A pipeline's weights under the names of the original Stable Diffusion code, as one file (docs/bake.md).

Other programs read this layout, and `from_single_file` of diffusers does. The names of both sides are in
`diffusers/loaders/single_file_utils.py`, which converts the other way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.models.family import Family

Weights = Mapping[str, Tensor]
Rename = tuple[str, str | Callable[[re.Match[str]], str]]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_XL_CLIP, _XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_OF_RESNETS: tuple[Rename, ...] = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_OF_THE_UNET: tuple[Rename, ...] = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
)
_OF_THE_VAE: tuple[Rename, ...] = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
_OF_OPEN_CLIP: tuple[Rename, ...] = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def single_file(pipe: Any, family: Family) -> dict[str, Tensor]:
    """Return the weights of a pipeline's denoiser, autoencoder and text encoders under their original names.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x or XL, or one around their U-Nets.
        family: its family.

    Returns:
        Name -> contiguous tensor in the pipeline's precision.

    Raises:
        NemoError: the layout has no place for a part of this model.
    """
    encoders: list[Any] = list(family.text_encoders(pipe).values())
    if len(encoders) == 1 and encoders[0].config.hidden_act != "quick_gelu":
        raise NemoError(
            "Stable Diffusion 2 can't be written as a single file: the original layout wants a last layer of the text "
            "encoder that a diffusers folder does not have"
        )
    weights = {
        **{_UNET + name: tensor for name, tensor in _unet(pipe.unet).items()},
        **{_VAE + name: tensor for name, tensor in _vae(pipe.vae).items()},
    }
    clip = _CLIP if len(encoders) == 1 else _XL_CLIP
    weights |= {f"{clip}text_model.{name}": tensor for name, tensor in _text_model(encoders[0]).items()}
    if len(encoders) == 2:
        weights |= {_XL_OPEN_CLIP + name: tensor for name, tensor in _open_clip(encoders[1]).items()}
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def _renamed(weights: Weights, renames: Sequence[Rename], known: str) -> dict[str, Tensor]:
    """Rename weights, and check that each has a name that the original has.

    Args:
        weights: name -> tensor.
        renames: patterns and what replaces them, in this order.
        known: a pattern of the original's names.
    """
    renamed = {}
    for name, tensor in weights.items():
        original = name
        for pattern, replacement in renames:
            original = re.sub(pattern, replacement, original)
        if not re.fullmatch(known, original):
            raise NemoError(f"{name} has no place in the original layout of Stable Diffusion's weights")
        renamed[original] = tensor
    assert len(renamed) == len(weights)
    return renamed


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise NemoError(f"a U-Net with layers_per_block={layers} can't be written as a single file: give it one number")
    # The blocks of both halves are numbered through. After the layers of a block comes its downsampler.
    per_block = layers + 1

    def down(match: re.Match[str]) -> str:
        block, kind, layer = int(match[1]), match[2], int(match[3])
        place = 1 + block * per_block
        if kind == "downsamplers":
            return f"input_blocks.{place + layers}.0.op."
        return f"input_blocks.{place + layer}.{int(kind == 'attentions')}."

    def up(match: re.Match[str]) -> str:
        block, kind, layer = int(match[1]), match[2], int(match[3])
        place = block * per_block
        if kind == "upsamplers":
            return f"output_blocks.{place + layers}.{1 + hasattr(unet.up_blocks[block], 'attentions')}.conv."
        return f"output_blocks.{place + layer}.{int(kind == 'attentions')}."

    renames: tuple[Rename, ...] = (
        (r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", down),
        (r"^down_blocks\.(\d+)\.(downsamplers)\.(0)\.conv\.", down),
        (r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", up),
        (r"^up_blocks\.(\d+)\.(upsamplers)\.(0)\.conv\.", up),
        *_OF_THE_UNET,
    )
    known = r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\..*"
    named: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        # In attentions, norm1 and norm2 are called so in the original too.
        of_this = (*renames, *_OF_RESNETS) if ".resnets." in name else renames
        named |= _renamed({name: tensor}, of_this, known)
    return named


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1  # the original counts the decoder's blocks from the image
    renames: tuple[Rename, ...] = (
        (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.block.{m[2]}."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{last - int(m[1])}.upsample."),
        *_OF_THE_VAE,
    )
    parts = r"((en|de)coder\.(conv_in|conv_out|norm_out|mid|down|up)|quant_conv|post_quant_conv)\..*"
    named = _renamed(vae.state_dict(), renames, parts)
    # What is a linear layer here was a 1×1 convolution.
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def _text_model(encoder: Any) -> dict[str, Tensor]:
    """The weights of a text encoder without the prefix that only some versions of transformers have."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    weights = _text_model(encoder)
    named = {"text_projection": weights.pop("text_projection.weight").T}
    for place in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"encoder.layers.{place}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            named[f"transformer.resblocks.{place}.attn.in_proj_{kind}"] = torch.cat(parts)
    known = r"token_embedding\.weight|positional_embedding|ln_final\..*|transformer\.resblocks\.\d+\.(ln_|mlp|attn).*"
    return named | _renamed(weights, _OF_OPEN_CLIP, known)
