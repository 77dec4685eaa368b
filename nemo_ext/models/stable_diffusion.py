"""Stable Diffusion 1.x and 2.x: a U-Net that reads the text through cross-attention, and one CLIP text encoder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext.errors import NemoError, warn
from nemo_ext.models.family import Family, NoisePredictor, TextEmbedding, unwrapped

# The order of the network. `named_modules()` of a U-Net yields the up blocks before the mid block.
_PARTS = ("down_blocks", "mid_block", "up_blocks")
_SEARCHED_BY_THE_PAPER = ("down_blocks", "mid_block")

_IN_A_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.to_v")
_IN_THE_MID_BLOCK = re.compile(r"mid_block\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.to_v")

# What a U-Net can want besides latents, a timestep and a text embedding: its configuration's name for it -> what it is.
_OTHER_INPUTS = {
    "addition_embed_type": "added conditioning of another kind than SDXL's",
    "encoder_hid_dim_type": "embeddings of images or other texts; for an IP-Adapter call pipe.unload_ip_adapter()",
    "class_embed_type": "embeddings of classes",
    "num_class_embeds": "class labels",
    "time_cond_proj_dim": "an embedding of the guidance scale, as models distilled from guidance have it",
}
# The smallest ᾱ at which the prediction's part in ε − x_T is not lost in the rounding of x_T.
_LEAST_SIGNAL = 1e-6


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, as `StableDiffusionPipeline` with `UNet2DConditionModel`.

    Pipelines that take images too, with or without a ControlNet, are measured by their U-Net and its text alone, and
    their images are those of a text-to-image pipeline with the same models. A U-Net for inpainting is measured as if
    everything were masked, so that nothing but the text says what to draw.

    "down+mid" names the value layers of the down blocks and of the mid block, which the paper searches; in Stable
    Diffusion 1 these are seven layers with 5,760 neurons.
    """

    name = "Stable Diffusion 1.x or 2.x"
    pipeline_classes: tuple[str, ...] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionInpaintPipeline",
    )
    components: tuple[str, ...] = ("unet", "text_encoder", "vae")
    searched_layers = "down+mid"
    #: diffusers' pipelines for text and for inpainting.
    text_class, inpaint_class = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
    #: What else the pipeline for text consists of, and its other arguments.
    others: tuple[str, ...] = ("tokenizer", "scheduler")
    arguments: Mapping[str, Any] = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    #: Of `_OTHER_INPUTS`, those that `_other_inputs` serves: the configuration's name for it and its value.
    served: tuple[str, str] | None = None

    def recognizes(self, model: Any) -> bool:
        unet = self.denoiser(model)
        return isinstance(unet, nn.Module) and hasattr(unwrapped(unet), "down_blocks")

    def denoiser(self, model: Any) -> nn.Module:
        unet: nn.Module = getattr(model, "unet", model)
        return unet

    def cross_attentions(self, denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for part in _PARTS:
            block = getattr(denoiser, part, None)
            if block is not None:
                for name, module in block.named_modules(prefix=part):
                    if getattr(module, "is_cross_attention", False):
                        yield name, module

    def layer_groups(self, layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {"down+mid": [layer for layer in layers if layer.startswith(_SEARCHED_BY_THE_PAPER)]}

    def short_name(self, layer: str) -> str | None:
        """`down 0.1` for `down_blocks.0.attentions.1…to_v`; the transformer block is named only if it is not 0."""
        if match := _IN_A_BLOCK.fullmatch(layer):
            part, block, attention, transformer = match.groups()
            return f"{part} {block}.{attention}" + ("" if transformer == "0" else f".{transformer}")
        if match := _IN_THE_MID_BLOCK.fullmatch(layer):
            attention, transformer = match.groups()
            return "mid" if attention == transformer == "0" else f"mid {attention}.{transformer}"
        return None

    def text_encoders(self, pipe: Any) -> Mapping[str, nn.Module]:
        return {"text_encoder": pipe.text_encoder}

    def encode(self, pipe: Any, texts: Sequence[str]) -> TextEmbedding:
        """Text embeddings, padded to the number of the text encoder's positions. Longer text is cut, with a warning.

        As in the pipeline's own encoding, the name of a textual inversion with several vectors becomes several tokens.
        """
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise NemoError(f"{type(pipe).__name__} has several text encoders: SD1 and SD2 have one")
        tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
        added = tokenizer.added_tokens_encoder
        vectors = [f"{token}_1" for token in added if f"{token}_1" in added]
        if vectors:
            # diffusers would expand the name once more in a text that has all tokens already.
            texts = [
                text if any(vector in text for vector in vectors) else pipe.maybe_convert_prompt(text, tokenizer)
                for text in texts
            ]
        # A tokenizer that was saved without a length has one of 10³⁰.
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        # `return_tensors` is not used, because transformers would then check every token a second time.
        encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
        warn_of_truncation(tokenizer, texts, encoded.attention_mask, length)
        # As in the diffusers pipelines: only a text encoder whose configuration asks for the mask gets it.
        masked = getattr(encoder.config, "use_attention_mask", False)
        hidden: Tensor = encoder(
            torch.tensor(encoded.input_ids, device=encoder.device),
            attention_mask=torch.tensor(encoded.attention_mask, device=encoder.device) if masked else None,
        )[0]
        return TextEmbedding(hidden)

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        config = pipe.unet.config
        self._check_unet(config)
        size = config.sample_size
        if size is None:
            raise NemoError(
                "the U-Net's configuration does not say how large latents are (sample_size is None): set it, for "
                "example pipe.unet.register_to_config(sample_size=64)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return config.out_channels, height, width

    def noise_predictor(self, pipe: Any, num_inference_steps: int, step_index: int) -> NoisePredictor:
        """The U-Net's prediction at one step of a DDIM schedule with the noise levels of the pipeline's scheduler.

        A v-prediction (Salimans and Ho, arXiv 2202.00512) is converted to noise: ε = √ᾱ v + √(1−ᾱ) x.
        """
        from diffusers import DDIMScheduler

        unet, device = pipe.unet, pipe.unet.device
        self._check_unet(unet.config)
        # A scheduler of our own, because `set_timesteps` would change the pipeline's.
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise NemoError(f"the scheduler's prediction_type must be epsilon or v_prediction, got {prediction}")
        scheduler.set_timesteps(num_inference_steps)
        timestep = scheduler.timesteps[step_index].to(device)
        alpha = scheduler.alphas_cumprod[int(timestep)].to(device)
        if alpha < _LEAST_SIGNAL:
            raise NemoError(
                f"at step {step_index} of {num_inference_steps} of this schedule the latents are noise alone (a "
                "terminal signal-to-noise ratio of zero), so no noise has to be predicted and every prompt would look "
                f"memorized: measure at a later step, such as Protocol(step_index={step_index + 1})"
            )

        masked = self._everything_masked(pipe)

        def predict(latents: Tensor, text: TextEmbedding) -> Tensor:
            texts = text.hidden.to(device, unet.dtype).expand(len(latents), -1, -1).contiguous()
            inputs = latents.to(unet.dtype)
            if masked is not None:
                inputs = torch.cat((inputs, masked.expand(len(latents), -1, -1, -1)), dim=1)
            others = self._other_inputs(pipe, text, len(latents))
            output = unet(inputs, timestep, encoder_hidden_states=texts, **others, return_dict=False)[0]
            noise: Tensor = output.float()
            if prediction == "v_prediction":
                noise = alpha.sqrt() * noise + (1 - alpha).sqrt() * latents
            return noise

        return predict

    def sampling_scheduler(self, pipe: Any) -> Any:
        """DDIM (Song et al., arXiv 2010.02502) without added noise, so that an image depends on its seed alone."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(pipe.scheduler.config)

    def _everything_masked(self, pipe: Any) -> Tensor | None:
        """The channels that a U-Net for inpainting gets besides the latents if everything is masked, [1, 5, H, W].

        These are a mask of ones and the latents of a gray image, as in the pipeline itself. None for other U-Nets.
        """
        unet = pipe.unet
        if unet.config.in_channels == unet.config.out_channels:
            return None
        _, height, width = self.latent_shape(pipe)
        side = (pipe.vae_scale_factor * height, pipe.vae_scale_factor * width)
        gray = torch.zeros(1, 3, *side, dtype=pipe.vae.dtype, device=pipe.vae.device)
        with torch.no_grad():
            latents = pipe.vae.encode(gray).latent_dist.mode() * pipe.vae.config.scaling_factor
        mask = torch.ones(1, 1, height, width, dtype=unet.dtype, device=unet.device)
        return torch.cat((mask, latents.to(mask)), dim=1)

    def _other_inputs(self, pipe: Any, text: TextEmbedding, rows: int) -> dict[str, Any]:
        """What the U-Net gets besides latents, timestep and the tokens' embeddings."""
        return {}

    def text_to_image(self, pipe: Any) -> Any:
        import diffusers

        wants_image = "image" in inspect.signature(type(pipe).__call__).parameters
        if not wants_image or pipe.unet.config.in_channels != pipe.unet.config.out_channels:
            return pipe
        parts = {name: getattr(pipe, name) for name in (*self.components, *self.others)}
        return getattr(diffusers, self.text_class)(**parts, **self.arguments)

    def generation_arguments(self, pipe: Any) -> Mapping[str, Any]:
        """For a pipeline for inpainting, an image and a mask over all of it."""
        if "mask_image" not in inspect.signature(type(pipe).__call__).parameters:
            return {}
        from PIL import Image

        _, height, width = self.latent_shape(pipe)
        size = (pipe.vae_scale_factor * width, pipe.vae_scale_factor * height)
        return {
            "image": Image.new("RGB", size, "gray"),
            "mask_image": Image.new("L", size, 255),
            "height": size[1],
            "width": size[0],
            "strength": 1.0,
        }

    def load(self, folder: Path, variant: str | None, size: tuple[int, int] | None) -> Any:
        import diffusers

        saved = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)["_class_name"]
        made = getattr(diffusers, self.inpaint_class if saved == self.inpaint_class else self.text_class)
        given = {"local_files_only": True, "use_safetensors": True, "variant": variant}
        parts: dict[str, Any] = {"safety_checker": None} if "safety_checker" in self.arguments else {}
        if size is not None:
            parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", sample_size=size, **given
            )
        parts |= {"requires_safety_checker": False} if "safety_checker" in parts else {}
        pipe = made.from_pretrained(folder, **parts, **given)
        # A tokenizer that was saved without a length would stop the pipeline's own encoding.
        for tokenizer, encoder in self._tokenizers(pipe):
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        return pipe

    def _tokenizers(self, pipe: Any) -> list[tuple[Any, Any]]:
        """Each tokenizer with its text encoder."""
        return [(pipe.tokenizer, pipe.text_encoder)]

    def _check_unet(self, config: Any) -> None:
        """Refuse a U-Net that needs more than latents, a timestep and a text embedding.

        Raises:
            NemoError: it does; the message names what it needs.
        """
        if config.in_channels not in (config.out_channels, 2 * config.out_channels + 1):
            raise NemoError(
                f"the U-Net takes {config.in_channels} channels and predicts {config.out_channels}: wanted a model for "
                "text-to-image or for inpainting"
            )
        for name, what in _OTHER_INPUTS.items():
            value = getattr(config, name, None)
            if value is not None and (name, value) != self.served:
                raise NemoError(
                    f"the U-Net wants more than latents, a timestep and a text embedding: {what} ({name} is {value!r})"
                )


def warn_of_truncation(
    tokenizer: Any, texts: Sequence[str], attention_mask: Sequence[Sequence[int]], length: int
) -> None:
    """Warn of texts that are cut to `length` tokens; `attention_mask` is that of the cut texts, [B, T]."""
    # Only a row without padding can have been cut, so that most prompts are tokenized only once.
    full = [text for text, tokens in zip(texts, attention_mask, strict=True) if all(tokens)]
    cut = [text for text in full if len(tokenizer(text).input_ids) > length]
    if cut:
        others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        warn(f"cut to {length} tokens: '{cut[0]}'{others}")
