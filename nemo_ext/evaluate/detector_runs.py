"""Measuring all detectors of memorized prompts together, so that they share the denoiser's calls.

The noise ε(x_T, T, e) of a prompt is predicted once for NeMo's score, the magnitude, the entropies and the anisotropy.
The noise of the empty prompt in the initial latents is predicted once for all prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.attention import attention_entropy, cross_attention_names, recorded_attention
from nemo_ext.evaluate.detectors import (
    ALIGNMENT_WEIGHT,
    ANISOTROPY,
    FIRST_MAGNITUDE,
    GUIDANCE_ALIGNMENT,
    LATE_STEP,
    LAYER_ENTROPY,
    MEAN_ENTROPY,
    MEAN_MAGNITUDE,
    NEMO,
    NORM_WEIGHT,
    PUBLISHED_LAYER,
    Z_SCORE,
    Detector,
)
from nemo_ext.measure.activations import ValueStack
from nemo_ext.measure.generation import default_guidance
from nemo_ext.measure.memory import fitting_batch_size
from nemo_ext.measure.noise import initial_latents, scaled
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import pairwise_score, seed_latents
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.models.family import NoisePredictor, TextEmbedding
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled
from nemo_ext.models.text import encode_prompts


class _Step(NamedTuple):
    """Step number `place`, counted from 0, of a schedule with `steps` steps."""

    steps: int
    place: int


class DetectorRuns:
    """Measures all detectors for one prompt after another.

    Neurons that a patch has switched off stay off. The pipeline does not change.

    Args:
        pipe: a pipeline.
        statistics: μ and σ of this model's activations; None: no z-scores.
        protocol: how to measure. Its schedule and step hold for all detectors but `MEAN_MAGNITUDE`.
        seeds: S, the number of seeds; NeMo's score needs two.
        steps: the number of steps of the guided generation.
        guidance: the scale of classifier-free guidance; None: the default of the pipeline's `__call__`.
        batch_size: latents in one call of the denoiser. It changes the results by rounding only. None: as many as
            memory allows (`fitting_batch_size`), at most `seeds`.

    Attributes:
        guidance: the scale that is used; None if it is not known.
        unavailable: detectors that cannot be measured here -> the reason.
        samples: the number of latents that the denoiser has evaluated so far, for all detectors together.

    Raises:
        NemoError: an argument is out of range, the statistics belong to another model, or the denoiser or the scheduler
            is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        statistics: ActivationStatistics | None,
        protocol: Protocol,
        seeds: int,
        steps: int,
        guidance: float | None,
        batch_size: int | None,
    ) -> None:
        for name, number in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise NemoError(f"{name} must be 1 or more, got {number}")
        if statistics is not None:
            statistics.check(pipe)
        self._pipe, self._family = pipe, family_of(pipe)
        denoiser: Any = self._family.denoiser(pipe)
        self._dtype, self._compiled = denoiser.dtype, is_compiled(denoiser)
        self._statistics, self._protocol, self._seeds, self._steps = statistics, protocol, seeds, steps
        self._stack = None if statistics is None else ValueStack(value_layers(pipe, statistics.layers))
        self._latents = initial_latents(pipe, seeds, protocol).float().to(denoiser.device)
        self._empty = encode_prompts(pipe, [""])
        rows = fitting_batch_size(pipe, self._empty) if batch_size is None else batch_size
        self._batch_size = min(seeds, rows)
        self._layers = cross_attention_names(pipe)
        self._first = _Step(protocol.num_inference_steps, protocol.step_index)
        self._late = _Step(protocol.num_inference_steps, protocol.num_inference_steps - LATE_STEP)
        self._predictors: dict[_Step, NoisePredictor] = {}
        self._unconditional: dict[_Step, Tensor] = {}
        self.samples = 0
        self.guidance = guidance
        self.unavailable: dict[Detector, str] = {}
        self._find_unavailable()

    def samples_alone(self) -> dict[Detector, int]:
        """Detector -> the latents that the denoiser evaluates for one prompt, if this detector is measured alone.

        The conditional and the unconditional prediction of a latent count as two. In `samples` they are fewer, because
        detectors share them, and prompts share those of the empty prompt.
        """
        one = self._seeds
        return {
            NEMO: one,
            FIRST_MAGNITUDE: 2 * one,
            MEAN_MAGNITUDE: 2 * one * self._steps,
            LAYER_ENTROPY: one,
            MEAN_ENTROPY: one,
            Z_SCORE: 0,
            ANISOTROPY: 4 * one,
            GUIDANCE_ALIGNMENT: 2 * one,
        }

    def scores(self, prompt: str) -> dict[Detector, float]:
        """Measure all available detectors for a prompt.

        Args:
            prompt: the text.

        Returns:
            Detector -> score. A z-score can be infinite (`ActivationStatistics.z_scores`).

        Raises:
            NemoError: the predicted noise is not finite, or as for `encode_prompts`.
        """
        text = encode_prompts(self._pipe, [prompt])
        with evaluating(self._pipe):
            noise, attention = self._noise_and_attention(text)
            magnitude = _norms(noise - self._unconditional[self._first]).mean().item()
            scores = {FIRST_MAGNITUDE: magnitude}
            if self._can(NEMO):
                scores[NEMO] = pairwise_score(scaled(noise - self._latents), self._protocol).max
            if self._can(MEAN_MAGNITUDE):
                scores[MEAN_MAGNITUDE] = self._mean_magnitude(text, noise)
            if self._can(MEAN_ENTROPY):
                scores[MEAN_ENTROPY] = attention_entropy(attention.mean(0)).mean().item()
            if self._can(LAYER_ENTROPY):
                scores[LAYER_ENTROPY] = attention_entropy(attention[PUBLISHED_LAYER]).mean().item()
            if self._can(GUIDANCE_ALIGNMENT):
                scores[GUIDANCE_ALIGNMENT] = self._alignment(text)
                scores[ANISOTROPY] = NORM_WEIGHT * magnitude + ALIGNMENT_WEIGHT * scores[GUIDANCE_ALIGNMENT]
            if self._statistics is not None and self._stack is not None:
                activations = self._stack.split(self._stack.activations(text.hidden.to(self._stack.weight)))
                scores[Z_SCORE] = max(z.max().item() for z in self._statistics.z_scores(activations).values())
        return scores

    def _can(self, detector: Detector) -> bool:
        return detector not in self.unavailable

    def _find_unavailable(self) -> None:
        """Find the detectors that cannot be measured, and predict the noise of the empty prompt at the first step."""
        try:
            seed_latents(self._pipe, self._seeds, self._protocol)
        except NemoError as error:
            self.unavailable[NEMO] = str(error)
        if self._statistics is None:
            self.unavailable[Z_SCORE] = "it needs activation statistics: give the result of collect_statistics"
        if self._late.place < 0:
            self.unavailable[ANISOTROPY] = self.unavailable[GUIDANCE_ALIGNMENT] = (
                f"it needs a schedule of {LATE_STEP} steps or more: the protocol has {self._late.steps}"
            )
        try:
            if self.guidance is None:
                self.guidance = default_guidance(self._pipe)
            self._scheduler()
        except NemoError as error:
            self.unavailable[MEAN_MAGNITUDE] = str(error)
        with evaluating(self._pipe), recorded_attention(self._pipe) as recorded:
            self._unconditional[self._first] = self._noise(self._first, self._empty, self._latents, recording=True)
        unseen = [layer for layer in self._layers if sum(map(len, recorded.get(layer, ()))) != self._seeds]
        if unseen:
            self.unavailable[LAYER_ENTROPY] = self.unavailable[MEAN_ENTROPY] = (
                f"the attention of {unseen[0]} cannot be observed: its projections are fused or normalized, its "
                "attention is masked, or it is not called exactly once"
            )
        elif not self._layers:
            self.unavailable[LAYER_ENTROPY] = self.unavailable[MEAN_ENTROPY] = "the denoiser has no cross-attention"
        elif len(self._layers) <= PUBLISHED_LAYER:
            self.unavailable[LAYER_ENTROPY] = (
                f"it reads the fourth cross-attention, and the denoiser has {len(self._layers)}"
            )

    def _noise(self, step: _Step, text: TextEmbedding, latents: Tensor, *, recording: bool = False) -> Tensor:
        """ε, [S, C, H, W] float32, at a step; `recording` says that attention is recorded, with the denoiser eager."""
        if step not in self._predictors:
            self._predictors[step] = self._family.noise_predictor(self._pipe, *step)
        rows = []
        for batch in latents.split(self._batch_size):
            # torch.compile would compile again for another number of rows, so the last batch is padded.
            missing = self._batch_size - len(batch) if self._compiled and not recording else 0
            padded = functional.pad(batch, (0, 0) * 3 + (0, missing))
            self.samples += len(padded)
            rows.append(self._predictors[step](padded, text)[: len(batch)])
        noise = torch.cat(rows)
        if not noise.isfinite().all():
            raise NemoError(f"the predicted noise is not finite: use float32 or bfloat16 instead of {self._dtype}")
        return noise

    def _noise_of_empty(self, step: _Step) -> Tensor:
        """ε(x_T, t, e_∅), which all prompts share."""
        if step not in self._unconditional:
            self._unconditional[step] = self._noise(step, self._empty, self._latents)
        return self._unconditional[step]

    def _noise_and_attention(self, text: TextEmbedding) -> tuple[Tensor, Tensor]:
        """ε(x_T, T, e), [S, C, H, W], and p̄ of L cross-attentions, [L, S, T]; [0] if they cannot be observed."""
        if not self._can(MEAN_ENTROPY):
            return self._noise(self._first, text, self._latents), torch.empty(0)
        with recorded_attention(self._pipe) as recorded:
            noise = self._noise(self._first, text, self._latents, recording=True)
        return noise, torch.stack([torch.cat(recorded[layer]) for layer in self._layers])

    def _alignment(self, text: TextEmbedding) -> float:
        unconditional = self._noise_of_empty(self._late)
        guidance = self._noise(self._late, text, self._latents) - unconditional
        return functional.cosine_similarity(unconditional, guidance, dim=1).mean().item()

    def _mean_magnitude(self, text: TextEmbedding, first: Tensor) -> float:
        """Generate with guidance, without decoding, and average the magnitude; `first` is ε(x_T, T, e)."""
        assert self.guidance is not None
        scheduler, latents = self._scheduler(), self._latents
        magnitudes = []
        for index, timestep in enumerate(scheduler.timesteps):
            step = _Step(self._steps, index)
            conditional = first if step == self._first and index == 0 else self._noise(step, text, latents)
            unconditional = self._noise_of_empty(step) if index == 0 else self._noise(step, self._empty, latents)
            difference = conditional - unconditional
            magnitudes.append(_norms(difference))
            noise = unconditional + self.guidance * difference
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return torch.stack(magnitudes).mean().item()

    def _scheduler(self) -> Any:
        """The family's scheduler for the guided generation, which takes ε whatever the denoiser predicts.

        Raises:
            NemoError: the scheduler cannot step from x_T with ε.
        """
        scheduler = self._family.sampling_scheduler(self._pipe)
        scheduler.set_timesteps(self._steps)
        if "prediction_type" not in scheduler.config or float(scheduler.init_noise_sigma) != 1:
            raise NemoError(f"{type(scheduler).__name__} does not step with predicted noise: wanted DDIM or the like")
        if len(scheduler.timesteps) != self._steps:
            raise NemoError(f"{type(scheduler).__name__} has {len(scheduler.timesteps)} timesteps for {self._steps}")
        # The family's predictor has converted a v-prediction to ε. This scheduler is ours alone, so it may change.
        scheduler.register_to_config(prediction_type="epsilon")
        return scheduler


def _norms(noise: Tensor) -> Tensor:
    """The L2 norm of each latent, [S]."""
    norms: Tensor = noise.flatten(1).norm(dim=1)
    return norms
