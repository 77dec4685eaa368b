"""Noise differences of a prompt, one for each seed (docs/method.md, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.family import NoisePredictor, TextEmbedding
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled

#: Latents in one call of the denoiser, if the memory is not measured: the default number of seeds.
DEFAULT_BATCH_SIZE = 10


def initial_latents(pipe: Any, seeds: int, protocol: Protocol) -> Tensor:
    """Draw x_T of every seed on the CPU, so that a seed gives the same latents on every device.

    Args:
        pipe: a pipeline; its family knows C, H and W.
        seeds: S, the number of seeds.
        protocol: `first_seed` and `seeds_share_generator` are read.

    Returns:
        [S, C, H, W] float32 on the CPU.

    Raises:
        NemoError: the denoiser needs more than latents, a timestep and a text embedding.
    """
    shape = family_of(pipe).latent_shape(pipe)
    if protocol.seeds_share_generator:
        generator = torch.Generator("cpu").manual_seed(protocol.first_seed)
        return torch.randn(seeds, *shape, generator=generator)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(protocol.first_seed + s))
            for s in range(seeds)
        ]
    )


def noise_predictor(pipe: Any, protocol: Protocol) -> NoisePredictor:
    """Return the family's `noise_predictor` for the step that a protocol measures."""
    return family_of(pipe).noise_predictor(pipe, protocol.num_inference_steps, protocol.step_index)


def noise_differences(
    pipe: Any,
    text: TextEmbedding,
    latents: Tensor,
    protocol: Protocol,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    guidance: tuple[float, TextEmbedding] | None = None,
    predict: NoisePredictor | None = None,
) -> Tensor:
    """δ = ε(x_T, T, y) − x_T, scaled to [0, 1] per sample and channel (docs/method.md, section 3).

    Neurons that a patch has switched off stay off. The pipeline does not change.

    Args:
        pipe: a pipeline; its scheduler's configuration gives the timestep and says what the denoiser predicts.
        text: the prompt's embedding.
        latents: x_T, [S, C, H, W].
        protocol: `num_inference_steps` and `step_index` are read.
        batch_size: latents in one call of the denoiser. It changes the result by rounding only. A compiled denoiser
            always gets this many.
        guidance: (g, embedding of the empty prompt) for ε(y) + g (ε("") − ε(y)), which evaluates every latent
            twice; None: no guidance.
        predict: what `noise_predictor` returned for this protocol, for callers that measure often; None: a new one.

    Returns:
        δ, [S, C, H, W] float32 on the denoiser's device.

    Raises:
        NemoError: the scheduler or the denoiser is not supported, the noise is not finite, or a channel of ε − x_T
            has the same value everywhere, so that no map is left to compare.
    """
    family = family_of(pipe)
    denoiser: Any = family.denoiser(pipe)
    if predict is None:
        predict = noise_predictor(pipe, protocol)
    if batch_size < 1:
        raise NemoError(f"batch_size must be 1 or more, got {batch_size}")
    # torch.compile would compile again for another number of rows, so the last batch is padded.
    compiled = is_compiled(denoiser)

    def predicted(embedding: TextEmbedding, batch: Tensor) -> Tensor:
        padded = functional.pad(batch, (0, 0) * 3 + (0, batch_size - len(batch))) if compiled else batch
        return predict(padded, embedding)[: len(batch)]

    differences = []
    with evaluating(pipe):
        for batch in latents.float().to(denoiser.device).split(batch_size):
            noise = predicted(text, batch)
            if guidance is not None:
                noise = noise + guidance[0] * (predicted(guidance[1], batch) - noise)
            differences.append(noise - batch)
    difference = torch.cat(differences)
    if not difference.isfinite().all():
        bad = (~difference.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise NemoError(
            f"the predicted noise for seed {', '.join(map(str, bad))} (counted from 0) is not finite: "
            f"use float32 or bfloat16 instead of {denoiser.dtype}"
        )
    return scaled(difference)


def scaled(difference: Tensor) -> Tensor:
    """Scale ε − x_T, [S, C, H, W], to δ: [0, 1] per sample and channel.

    Raises:
        NemoError: a channel has the same value everywhere.
    """
    low = difference.amin(dim=(2, 3), keepdim=True)
    span = difference.amax(dim=(2, 3), keepdim=True) - low
    if not (span > 0).all():
        seed, channel = (span.flatten(1) <= 0).nonzero()[0].tolist()
        raise NemoError(
            f"the predicted noise of seed {seed} (counted from 0) is its latents plus a constant in channel {channel}, "
            "so there is nothing to compare: the denoiser's weights or the schedule are damaged"
        )
    return (difference - low) / span


def evaluate_zeros(pipe: Any, text: TextEmbedding, rows: int) -> None:
    """Call the denoiser with latents of zeros, so that the caller can observe the call.

    Args:
        pipe: a pipeline, whose denoiser is in evaluation mode.
        text: the embedding of any text.
        rows: the number of latents.
    """
    family = family_of(pipe)
    denoiser: Any = family.denoiser(pipe)
    predict = noise_predictor(pipe, Protocol.paper())
    with torch.no_grad():
        predict(torch.zeros(rows, *family.latent_shape(pipe), device=denoiser.device), text)
