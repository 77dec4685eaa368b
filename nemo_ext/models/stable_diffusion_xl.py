"""Stable Diffusion XL: two text encoders, and a U-Net that reads the pooled text and the size of the image besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.models.family import TextEmbedding, unwrapped
from nemo_ext.models.stable_diffusion import StableDiffusion, warn_of_truncation


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, as `StableDiffusionXLPipeline` with `UNet2DConditionModel`.

    The value layers read the embeddings of both text encoders side by side, 768 + 1280 = 2048 wide. The pooled
    embedding of the second one reaches the U-Net in another way, which no value neuron switches off. The size of the
    image that the U-Net is told is the one that the pipeline generates by default, without cropping.
    """

    name = "Stable Diffusion XL"
    pipeline_classes = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    components = ("unet", "text_encoder", "text_encoder_2", "vae")
    text_class, inpaint_class = "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"
    others = ("tokenizer", "tokenizer_2", "scheduler")
    arguments: Mapping[str, Any] = MappingProxyType({"add_watermarker": False})
    served = ("addition_embed_type", "text_time")

    def recognizes(self, model: Any) -> bool:
        config = getattr(unwrapped(self.denoiser(model)), "config", None)
        return super().recognizes(model) and getattr(config, "addition_embed_type", None) == "text_time"

    def text_encoders(self, pipe: Any) -> Mapping[str, nn.Module]:
        if pipe.text_encoder is None or getattr(pipe, "text_encoder_2", None) is None:
            raise NemoError(
                f"{type(pipe).__name__} lacks one of its two text encoders, as the refiner does: give the base model"
            )
        return {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}

    def encode(self, pipe: Any, texts: Sequence[str]) -> TextEmbedding:
        """The pipeline's own encoding. Text that is too long for a text encoder is cut, with a warning."""
        self.text_encoders(pipe)
        for tokenizer, encoder in self._tokenizers(pipe):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
            warn_of_truncation(tokenizer, texts, tokens.attention_mask, length)
        hidden, _, pooled, _ = pipe.encode_prompt(
            list(texts), device=pipe.text_encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return TextEmbedding(hidden, pooled)

    def _other_inputs(self, pipe: Any, text: TextEmbedding, rows: int) -> dict[str, Any]:
        """The pooled text, and the image's size: original, corner of the crop, and wanted."""
        assert text.pooled is not None
        unet = pipe.unet
        _, height, width = self.latent_shape(pipe)
        size = (pipe.vae_scale_factor * height, pipe.vae_scale_factor * width)
        times = torch.tensor([[*size, 0, 0, *size]], dtype=unet.dtype, device=unet.device)
        pooled = text.pooled.to(unet.device, unet.dtype)
        return {
            "added_cond_kwargs": {
                "text_embeds": pooled.expand(rows, -1).contiguous(),
                "time_ids": times.expand(rows, -1).contiguous(),
            }
        }

    def _tokenizers(self, pipe: Any) -> list[tuple[Any, Any]]:
        return [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
