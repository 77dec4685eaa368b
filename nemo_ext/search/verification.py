"""Verification: do the images come back, and the search that goes on if they do (docs/method.md, section 12)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.image_similarity import ImageSimilarity, PixelSimilarity
from nemo_ext.measure.threshold import Threshold
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import ImageTrial, Limits, Verdict
from nemo_ext.search.grouped import refine_grouped
from nemo_ext.search.image_probe import BudgetSpent, ImageProbe
from nemo_ext.search.image_runs import NOTHING, ImageRuns
from nemo_ext.search.outcome import Outcome, Task
from nemo_ext.search.selection import initial_selection

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST_STEP, IMAGES = "first step", "images"


@dataclass(frozen=True)
class Verification:
    """Whether and how sets of neurons are verified on images (docs/method.md, section 12).

    Attributes:
        sampling: how the images are generated; None: as those for τ_image were, or `Sampling()` if τ_image is a number.
        similarity: how alike two images are.
        threshold: τ_image; None: that of the `Threshold` that the localizer is given, which must have been measured
            with this sampling and similarity.
        stricter: how often the search at the first step is repeated with a lower τ, if images still replicate.
        budget: how many images may be generated for trials that are judged by images, if no τ helps.
        originals: prompt -> its training images, where they are known. A prompt's own originals are compared like
            images of the untouched model; those of other prompts tell which image has taken its place.
    """

    sampling: Sampling | None = None
    similarity: ImageSimilarity = field(default_factory=PixelSimilarity)
    threshold: float | None = None
    stricter: int = 4
    budget: int = 96
    originals: Mapping[str, Sequence[Image]] = field(default_factory=dict)

    def resolved(self, pipe: Any, threshold: float | Threshold) -> tuple[Verification, float]:
        """This verification with τ_image and the guidance as numbers, and the image score that counts as memorized.

        That score is the highest one of an ordinary prompt, if τ_image comes from a `Threshold`; else it is τ_image.

        Args:
            pipe: the pipeline.
            threshold: the τ of the search.

        Raises:
            NemoError: there is no τ_image for this sampling and similarity.
        """
        if self.threshold is not None:
            sampling = (self.sampling or Sampling()).resolved(pipe)
            return replace(self, sampling=sampling), self.threshold
        images = threshold.images if isinstance(threshold, Threshold) else None
        if images is None:
            raise NemoError(
                "verification needs τ_image: measure the threshold together with images (`nemo-ext threshold`, or "
                "memorization_threshold(…, sampling=Sampling())), give τ_image as a number, or do not verify "
                "(--no-verify)"
            )
        sampling = images.sampling if self.sampling is None else self.sampling.resolved(pipe)
        images.check(sampling, self.similarity.name)
        return replace(self, sampling=sampling, threshold=images.value), max(images.scores)

    @property
    def resolved_sampling(self) -> Sampling:
        """The sampling of a verification that `resolved` has returned."""
        assert self.sampling is not None
        return self.sampling

    def to_dict(self) -> dict[str, Any]:
        """The settings that a result depends on, as a dictionary for JSON; originals as a hash of their pixels.

        The verification must be resolved.
        """
        digest = hashlib.sha256()
        for prompt, images in sorted(self.originals.items()):
            digest.update(prompt.encode("utf-8") + b"\0")
            for image in images:
                digest.update(repr(image.size).encode() + np.asarray(image.convert("RGB")).tobytes())
        return {
            "sampling": self.resolved_sampling.to_dict(),
            "similarity": self.similarity.name,
            "threshold": self.threshold,
            "stricter": self.stricter,
            "budget": self.budget,
            "originals": digest.hexdigest() if self.originals else None,
        }


class Verifier:
    """Verifies the sets of one prompt.

    Args:
        runs: the images of the prompt.
        settings: the resolved verification.
        prompt: the text.
        originals: prompt -> descriptions of its training images, [O, …], for all prompts whose images are known.
        on_images: a function that is called after images have been generated and compared.
    """

    def __init__(
        self,
        runs: ImageRuns,
        settings: Verification,
        *,
        prompt: str,
        originals: Mapping[str, Tensor],
        on_images: Callable[[], None] = lambda: None,
    ) -> None:
        assert settings.threshold is not None
        self.trials: list[ImageTrial] = []
        self._runs = runs
        self._settings = settings
        self._threshold = settings.threshold
        self._limits = Limits.of(runs.before(), settings.threshold)
        self._prompt = prompt
        self._originals = originals
        self._on_images = on_images

    def search(self, task: Task, search: Callable[[Task], Outcome], *, missed: bool = False) -> tuple[Outcome, Verdict]:
        """Search at the first step, and go on until the images no longer replicate.

        1. The search with the requested τ.
        2. While images still replicate, the search with a τ halfway between what was reached and the floor.
        3. If that does not help and all searched neurons off do: trials that are judged by the images.

        If the first step has missed the prompt, it says nothing of its image, and step 3 follows in any case.

        Args:
            task: the prompt to search.
            search: the search at the first step.
            missed: whether only the images have shown that the prompt replicates.

        Returns:
            What was found, and the verdict on it. If nothing helps, this is what was found in step 1.
        """
        first = outcome = search(task)
        trial = unsilenced = self._try(outcome, FIRST_STEP)
        for _ in range(0 if missed else self._settings.stricter):
            if not self._replicates(trial):
                return outcome, self._verdict(outcome.neurons, trial)
            assert outcome.score_after is not None
            floor = task.probe.remaining(task.all_neurons)
            lower = (outcome.score_after + floor) / 2
            if outcome.score_after - lower < task.protocol.raise_margin:
                break
            stricter = search(replace(task, threshold=lower))
            if stricter.neurons == outcome.neurons:
                break
            outcome = stricter
            trial = self._try(outcome, f"{FIRST_STEP}, τ lowered to {lower:.3f}")
        if missed or self._replicates(trial):
            found = self._search_by_images(task, first, unsilenced, missed)
            if found is None:
                return first, self._verdict(first.neurons, unsilenced)
            if self._replicates(unsilenced) or len(found[0].neurons) < len(first.neurons):
                outcome, trial = found
        return outcome, self._verdict(outcome.neurons, trial)

    def unsearched(self) -> tuple[Outcome, Verdict]:
        """The outcome for a prompt that is not memorized, and the verdict with no neuron off."""
        before = self._runs.before()
        return Outcome(), self._verdict(NOTHING, ImageTrial(0, "no neuron off", None, before, before))

    def _search_by_images(
        self, task: Task, first: Outcome, failed: ImageTrial, missed: bool
    ) -> tuple[Outcome, ImageTrial] | None:
        """Search with trials that are judged by images; None if all searched neurons off do not silence them.

        Args:
            task: the prompt to search.
            first: what the search with the requested τ found.
            failed: the trial of its set, which leaves copies, or at least is no answer.
            missed: as for `search`. Then the candidates of `first` mean nothing.
        """
        everything = task.all_neurons
        if self._replicates(self._try_set(everything, f"{IMAGES}, all searched neurons off", None)):
            return None
        probe = ImageProbe(self._runs, self._limits, self._settings.budget, failed)
        probe.remaining(everything)  # these images exist, and make it the best set so far
        reason = "the first step does not show this prompt" if missed else "no lower τ at the first step silenced them"
        note = f"the set was found by the images, because {reason}"
        theta: float | None = None
        top_k: int | None = None
        selected = everything
        try:
            candidates: Mapping[str, Sequence[int]] = everything
            if not missed and probe.remaining(first.initial_neurons, stop_above=1.0) <= 1:
                theta, top_k, selected = first.theta, first.top_k, first.initial_neurons
                candidates = selected
            else:
                with task.bars.task("images: selection") as advance:
                    selection = initial_selection(
                        task.activations(),
                        task.statistics,
                        probe,
                        1.0,
                        protocol=task.protocol,
                        on_trial=lambda: advance(1),
                    )
                if selection.threshold <= 1:
                    theta, top_k, candidates = selection.theta, selection.top_k, selection.candidates
                    selected = selection.neurons
            with task.bars.task("images: refinement") as advance:
                refine_grouped(candidates, probe, 1.0, on_trial=lambda: advance(1))
        except BudgetSpent:
            note += f"; its {self._settings.budget} images were spent before the set was as small as possible"
        assert probe.best is not None
        score = task.probe.remaining(probe.best)
        outcome = replace(
            first,
            neurons=probe.best,
            score_after=score,
            notes=(note,) if missed else (*first.notes, note),
            theta=theta,
            top_k=top_k,
            initial_neurons=selected,
        )
        return outcome, self._try(outcome, IMAGES)

    def _replicates(self, trial: ImageTrial) -> bool:
        return max(self._limits.excess(trial)) > 1

    def _try(self, outcome: Outcome, criterion: str) -> ImageTrial:
        return self._try_set(outcome.neurons, criterion, outcome.score_after)

    def _try_set(self, neurons: NeuronSet, criterion: str, score: float | None) -> ImageTrial:
        trial = ImageTrial(
            neurons=len(neurons),
            criterion=criterion,
            score=score,
            remaining=self._runs.remaining(neurons, self._runs.places),
            diversity=self._runs.diversity(neurons),
        )
        self.trials.append(trial)
        self._on_images()
        return trial

    def _verdict(self, neurons: NeuronSet, final: ImageTrial) -> Verdict:
        sampling, runs = self._settings.resolved_sampling, self._runs
        own = self._prompt in self._originals
        assert sampling.guidance is not None
        return Verdict(
            threshold=self._threshold,
            similarity=self._settings.similarity.name,
            seeds=sampling.all_seeds,
            steps=sampling.steps,
            guidance=sampling.guidance,
            before=runs.before(),
            final=final,
            trials=tuple(self.trials),
            originals_before=runs.with_originals(NOTHING, runs.places) if own else None,
            originals_after=runs.with_originals(neurons, runs.places) if own else None,
            instead=self._instead(neurons),
            unet_samples=float(runs.samples),
        )

    def _instead(self, neurons: NeuronSet) -> tuple[str | None, ...] | None:
        """For each seed, the other prompt whose training image appears: it is as similar as a copy would be."""
        if not self._originals:
            return None
        nearest = self._runs.nearest(neurons, self._originals)
        return tuple(
            prompt if prompt != self._prompt and value > self._limits.remaining else None for prompt, value in nearest
        )
