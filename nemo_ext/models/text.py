"""Prompts, and the text embeddings that the denoiser reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_ext.errors import NemoError
from nemo_ext.models.family import TextEmbedding
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Check that prompts are texts, and return them as a list.

    Raises:
        NemoError: `prompts` is one text instead of a sequence, or contains something that is not text.
    """
    if isinstance(prompts, str):
        raise NemoError("prompts must be a sequence of texts, got one text")
    listed = list(prompts)
    for place, prompt in enumerate(listed):
        if not isinstance(prompt, str):
            raise NemoError(f"prompt {place} must be text, got {type(prompt).__name__}")
    return listed


def skip_text_layers(pipe: Any, count: int) -> None:
    """Remove the last layers of the text encoders, which is what generating with `clip_skip` does.

    The final normalization stays. So images, activations and fingerprints are those of the shorter text encoder, and
    `clip_skip` is not given to the pipeline any more.

    Args:
        pipe: a pipeline with CLIP text encoders.
        count: the number of layers, 0 or more.

    Raises:
        NemoError: there are several text encoders, or one has no list of layers, or not more than `count` of them.
    """
    if count == 0:
        return
    encoders = family_of(pipe).text_encoders(pipe)
    if len(encoders) > 1:
        raise NemoError("clip_skip is for models with one text encoder, because a pooled embedding needs all layers")
    for name, module in encoders.items():
        # The layers of a CLIP text encoder have had two places in transformers.
        layers = getattr(getattr(getattr(module, "text_model", module), "encoder", None), "layers", None)
        if layers is None:
            raise NemoError(f"{name} is a {type(module).__name__}, of which no layers can be skipped")
        if not 0 <= count < len(layers):
            raise NemoError(
                f"clip_skip must be from 0 to {len(layers) - 1}, because {name} has {len(layers)} layers, got {count}"
            )
    for module in encoders.values():
        encoder: Any = getattr(module, "text_model", module)
        encoder.encoder.layers = encoder.encoder.layers[: len(encoder.encoder.layers) - count]
        encoder.config.num_hidden_layers = len(encoder.encoder.layers)


def encode_prompts(pipe: Any, prompts: Sequence[str]) -> TextEmbedding:
    """The embeddings of prompts, as the denoiser reads them.

    Args:
        pipe: a pipeline.
        prompts: B texts. A text that is too long for the text encoder is cut, with a warning.

    Returns:
        The embeddings of B texts in the denoiser's dtype and on its device, without gradients.

    Raises:
        NemoError: there are no prompts, a prompt is not text, or the pipeline has several text encoders.
    """
    texts = check_prompts(prompts)
    if not texts:
        raise NemoError("prompts must have at least one text, got none")
    family = family_of(pipe)
    with evaluating(pipe):
        embedding = family.encode(pipe, texts)
    # A pipeline that was loaded without a dtype can have a text encoder in half precision and a denoiser in float32.
    denoiser: Any = family.denoiser(pipe)
    return embedding.to(denoiser.device, denoiser.dtype)
