"""How well detectors of memorized prompts work on prompts whose labels are known."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.detector_runs import DetectorRuns
from nemo_ext.evaluate.detectors import DETECTORS, Detector
from nemo_ext.evaluate.roc import (
    Estimate,
    Resamples,
    auroc,
    false_positives_allowed,
    tpr_at_1_percent_fpr,
)
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.models.state import model_fingerprint
from nemo_ext.models.text import check_prompts
from nemo_ext.progress import ProgressLike, open_progress
from nemo_ext.ranks.parts import digest_of, measure_each, open_parts
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.torch_state import plain_torch

#: The number of bootstrap resamples, and the seed with which they are drawn.
RESAMPLES, BOOTSTRAP_SEED = 1000, 0


@dataclass(frozen=True)
class MeasuredDetector:
    """The scores of a detector, or the reason why there are none.

    Attributes:
        detector: the detector.
        unet_samples: the latents that the denoiser evaluates for one prompt, if this detector is measured alone. The
            conditional and the unconditional prediction of guidance count as two.
        scores: one score for each prompt; None if the detector could not be measured.
        reason: why there are no scores; None if there are.
    """

    detector: Detector
    unet_samples: int
    scores: tuple[float, ...] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class DetectionRow:
    """One detector of a `DetectionTable`.

    Attributes:
        measured: the detector with its scores.
        auroc: the area under the ROC curve (`nemo_ext.evaluate.roc.auroc`); None without scores.
        tpr_at_1_percent_fpr: the true positive rate at a false positive rate of at most 1 %; None without scores.
    """

    measured: MeasuredDetector
    auroc: Estimate | None = None
    tpr_at_1_percent_fpr: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as a flat dictionary for JSON, which has no infinity: an infinite score is None there."""
        detector, scores = self.measured.detector, self.measured.scores
        return {
            **asdict(detector),
            "unet_samples": self.measured.unet_samples,
            "auroc": None if self.auroc is None else asdict(self.auroc),
            "tpr_at_1_percent_fpr": None if self.tpr_at_1_percent_fpr is None else asdict(self.tpr_at_1_percent_fpr),
            "scores": None if scores is None else [score if math.isfinite(score) else None for score in scores],
            "reason": self.measured.reason,
        }


@dataclass(frozen=True)
class DetectionSettings:
    """How the scores of a `DetectionTable` were measured.

    Attributes:
        protocol: the protocol.
        seeds: S, the number of seeds.
        steps: the number of steps of the guided generation.
        guidance: the scale of guidance; None if the pipeline has no default and none was given.
        unet_samples: the latents that the denoiser evaluated for all prompts and detectors together.
    """

    protocol: Protocol
    seeds: int
    steps: int
    guidance: float | None
    unet_samples: int


@dataclass(frozen=True)
class DetectionTable:
    """How well each detector separates memorized prompts from ordinary ones.

    Attributes:
        rows: one row for each detector, also for those that could not be measured.
        labels: for each prompt, in the order of the scores, whether it is memorized.
        false_positives_allowed: the number of ordinary prompts that may be called memorized at 1 % FPR. With fewer than
            100 ordinary prompts it is 0. The TPR at 1 % FPR is then the TPR at an FPR of 0.
        resamples, bootstrap_seed: the number of bootstrap resamples behind the intervals, and their seed.
        settings: how the scores were measured; None if they were given.
    """

    rows: tuple[DetectionRow, ...]
    labels: tuple[bool, ...]
    false_positives_allowed: int
    resamples: int
    bootstrap_seed: int
    settings: DetectionSettings | None = None

    @property
    def memorized(self) -> int:
        """The number of memorized prompts."""
        return sum(self.labels)

    @property
    def ordinary(self) -> int:
        """The number of ordinary prompts."""
        return len(self.labels) - self.memorized

    def to_dict(self) -> dict[str, Any]:
        """All fields and both numbers of prompts as a dictionary for JSON."""
        return {
            "memorized": self.memorized,
            "ordinary": self.ordinary,
            "false_positives_allowed": self.false_positives_allowed,
            "resamples": self.resamples,
            "bootstrap_seed": self.bootstrap_seed,
            "settings": None if self.settings is None else asdict(self.settings),
            "labels": list(self.labels),
            "detectors": [row.to_dict() for row in self.rows],
        }


def detection_table(
    measured: Sequence[MeasuredDetector],
    memorized: Sequence[bool],
    *,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
    settings: DetectionSettings | None = None,
) -> DetectionTable:
    """Compute AUROC and TPR at 1 % FPR of detectors, with 95 % bootstrap intervals.

    The intervals come from prompts drawn with replacement, stratified by label, the same ones for all detectors.
    `Resamples.estimate` says what such an interval does not show. With fewer than 100 ordinary prompts, the TPR at 1 %
    FPR is the TPR at an FPR of 0. Equal arguments give equal results.

    Args:
        measured: the detectors with their scores.
        memorized: for each prompt, in the order of the scores, whether it is memorized.
        resamples: the number of resamples.
        seed: the seed with which they are drawn.
        settings: how the scores were measured, which the result repeats.

    Returns:
        The table, with one row for each detector.

    Raises:
        NemoError: a class has no prompts, `resamples` is below 1, a detector has another number of scores than there
            are labels, or a score is NaN.
    """
    labels = _checked_labels(memorized)
    if resamples < 1:
        raise NemoError(f"resamples must be 1 or more, got {resamples}")
    chosen = np.array(labels)
    count = int(chosen.sum())
    drawn = Resamples.draw(count, len(labels) - count, resamples, seed)
    rows = []
    for one in measured:
        if one.scores is None:
            rows.append(DetectionRow(one))
            continue
        scores = np.array(one.scores, dtype=np.float64)
        if len(scores) != len(labels):
            raise NemoError(f"{one.detector.name} has {len(scores)} scores for {len(labels)} labels: give one for each")
        if np.isnan(scores).any():
            raise NemoError(f"a score of {one.detector.name} is NaN: use float32 or bfloat16")
        if not one.detector.higher_is_memorized:
            scores = -scores
        classes = scores[chosen], scores[~chosen]
        rows.append(DetectionRow(one, drawn.estimate(auroc, *classes), drawn.estimate(tpr_at_1_percent_fpr, *classes)))
    return DetectionTable(
        rows=tuple(rows),
        labels=labels,
        false_positives_allowed=false_positives_allowed(len(labels) - count),
        resamples=resamples,
        bootstrap_seed=seed,
        settings=settings,
    )


@plain_torch()
def measure_detectors(
    pipe: Any,
    prompts: Sequence[str],
    memorized: Sequence[bool],
    *,
    statistics: ActivationStatistics | None,
    protocol: Protocol | None = None,
    seeds: int = 4,
    steps: int = 10,
    guidance: float | None = None,
    batch_size: int | None = None,
    parts: str | os.PathLike[str] | None = None,
    ranks: Ranks | None = None,
    progress: ProgressLike = None,
) -> DetectionTable:
    """Measure how well each detector of `nemo_ext.evaluate.detectors` recognizes memorized prompts.

    One pass over the prompts serves all detectors. If statistics are missing, or if the model's family does not allow a
    measurement, the detector has a row with the reason. Neurons that a patch has switched off stay off. The pipeline
    does not change. The same arguments give the same result up to rounding.

    Args:
        pipe: a pipeline.
        prompts: the texts, of both classes.
        memorized: for each prompt, whether the model has memorized it.
        statistics: μ and σ of this model's activations, from other prompts; None: no z-scores.
        protocol: how to measure; None: `Protocol.paper()`. Its schedule and step hold for all detectors except for the
            magnitude over all steps.
        seeds: S, the number of seeds. NeMo's score needs two; its paper takes ten.
        steps: the number of steps of the guided generation. Wen et al. take 50.
        guidance: the scale of classifier-free guidance; None: the default of the pipeline's `__call__`.
        batch_size: latents in one call of the denoiser. It changes the result by rounding only. None: as many as
            memory allows (`fitting_batch_size`), at most `seeds`.
        parts: a folder for what is finished, so that the same call continues after it was stopped. It stays; delete it
            when the table is saved. None: nothing is written.
        ranks: the processes that share the prompts (docs/scale.md), all of which make this call; None: this one alone.
        progress: as for `nemo_ext.progress.open_progress`.

    Returns:
        The table, with the scores of all prompts.

    Raises:
        NemoError: the labels do not fit the prompts, a class has no prompts, an argument is out of range, the
            statistics belong to another model, the denoiser or the scheduler is not supported, or the predicted noise
            is not finite.
    """
    texts, labels = check_prompts(prompts), _checked_labels(memorized)
    if len(texts) != len(labels):
        raise NemoError(f"each prompt needs one label: got {len(texts)} prompts and {len(labels)} labels")
    protocol = protocol or Protocol.paper()
    runs = DetectorRuns(
        pipe,
        statistics=statistics,
        protocol=protocol,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
    )

    def measure(place: int) -> dict[str, Any]:
        before = runs.samples
        scores = runs.scores(texts[place])
        # As text, because a z-score can be infinite, and JSON has no such number.
        return {"scores": {one.name: repr(score) for one, score in scores.items()}, "samples": runs.samples - before}

    prepared = runs.samples
    with ExitStack() as stack:
        bars = stack.enter_context(open_progress(progress))
        advance = stack.enter_context(bars.task("detectors", len(texts)))
        settings = {
            "model": model_fingerprint(pipe),
            "prompts": digest_of(texts),
            "statistics": None if statistics is None else statistics.digest(),
            "protocol": protocol.to_dict(),
            "seeds": seeds,
            "steps": steps,
            "guidance": runs.guidance,
        }
        ranks = ranks or Ranks()
        folder = stack.enter_context(open_parts(parts, settings, ranks))
        parts_of_all = measure_each(len(texts), "detectors", measure, dict, folder, ranks, advance)
    found = [
        {one: float(part["scores"][one.name]) for one in DETECTORS if one.name in part["scores"]}
        for part in parts_of_all
    ]
    alone = runs.samples_alone()
    measured = [
        MeasuredDetector(detector, alone[detector], reason=runs.unavailable[detector])
        if detector in runs.unavailable
        else MeasuredDetector(detector, alone[detector], scores=tuple(scores[detector] for scores in found))
        for detector in DETECTORS
    ]
    samples = prepared + sum(part["samples"] for part in parts_of_all)
    return detection_table(measured, labels, settings=DetectionSettings(protocol, seeds, steps, runs.guidance, samples))


def _checked_labels(memorized: Sequence[bool]) -> tuple[bool, ...]:
    listed = list(memorized)
    for place, label in enumerate(listed):
        if not isinstance(label, (bool, np.bool_)):
            raise NemoError(f"label {place} must be True or False, got {label!r}")
    labels = tuple(bool(label) for label in listed)
    if all(labels) or not any(labels):
        raise NemoError(
            f"detectors are measured on both classes: got {sum(labels)} memorized and "
            f"{len(labels) - sum(labels)} ordinary prompts, give at least one of each"
        )
    return labels
