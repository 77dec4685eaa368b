"""Localizing the neurons that carry a prompt's image, for one prompt or for many: score, search and certificate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import ValueStack
from nemo_ext.measure.memory import fitting_batch_size, keep_freed_memory
from nemo_ext.measure.noise import evaluate_zeros
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity_scales
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.measure.threshold import Threshold
from nemo_ext.models.family import TextEmbedding
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled, model_fingerprint
from nemo_ext.models.text import check_prompts, encode_prompts
from nemo_ext.patching.patch import PatchHandle, patch_handle
from nemo_ext.progress import Progress, ProgressLike, open_progress
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.results.folder import ORIGINAL, ResultsFolder, image_name
from nemo_ext.results.job import ResultsJob
from nemo_ext.results.record import Localization, Settings
from nemo_ext.search.certificate import certify
from nemo_ext.search.exhaustive import search_exhaustive
from nemo_ext.search.grouped import search_grouped
from nemo_ext.search.image_runs import NOTHING, ImageRuns
from nemo_ext.search.outcome import Outcome, Task
from nemo_ext.search.partial_unet import EntryPoints
from nemo_ext.search.probe import NoiseProbe
from nemo_ext.search.runs import Runs
from nemo_ext.search.verification import Verification, Verifier
from nemo_ext.torch_state import plain_torch

if TYPE_CHECKING:
    from PIL.Image import Image

#: The searches, under the names that `search=` takes.
SEARCHES: Mapping[str, Callable[[Task], Outcome]] = {
    "exhaustive": search_exhaustive,
    "grouped": search_grouped,
}


class _Searched(NamedTuple):
    found: Localization
    images: ImageRuns | None


class Localizer:
    """Finds the neurons of one pipeline that carry memorized images (docs/method.md).

    After each search, and after an exception, the pipeline is exactly as it was before. Equal seeds give equal neurons
    in every run and with any batch size.

    Args:
        pipe: a pipeline. Neurons that a patch has switched off are on during the search.
        statistics: μ and σ of this model's activations.
        threshold: τ, either a number from -1 to 1, or a `Threshold` that was measured on this model with the same
            protocol and number of seeds.
        search: "grouped" takes the paper's decisions with several candidates in one trial, for a fraction of the U-Net
            samples; its set differs from the paper's only if switching a neuron on lowers the score somewhere.
            "exhaustive" is the paper's search, one candidate at a time.
        protocol: how to measure and search; None: `Protocol.paper()`.
        seeds: S ≥ 2.
        batch_size: latents in one call of the denoiser; None: as many as memory allows (`fitting_batch_size`).
        layers: the layers to search, as for `value_layers`; None: the layers of the statistics.
        verify: whether the images come back is checked in this way, and the search goes on if they do; None: only the
            first step is looked at.

    Raises:
        NemoError: the statistics or the threshold belong to another model, the threshold was measured with other
            settings or is not a similarity, a layer has no statistics, the search is unknown, or there is no τ_image
            for the verification.
    """

    @plain_torch()
    def __init__(
        self,
        pipe: Any,
        *,
        statistics: ActivationStatistics,
        threshold: float | Threshold,
        search: str = "grouped",
        protocol: Protocol | None = None,
        seeds: int = 10,
        batch_size: int | None = None,
        layers: str | Sequence[str] | None = None,
        verify: Verification | None = None,
    ) -> None:
        if search not in SEARCHES:
            raise NemoError(f"search must be {' or '.join(map(repr, SEARCHES))}, got '{search}'")
        self.pipe = pipe
        self.statistics = statistics
        self.search = search
        self.protocol = protocol or Protocol.paper()
        self.seeds = seeds
        self.batch_size = batch_size
        self.layers = tuple(value_layers(pipe, statistics.layers if layers is None else layers))
        for layer in self.layers:
            if layer not in statistics.widths:
                raise NemoError(f"the statistics have no layer '{layer}': collect them with these layers")
        statistics.check(pipe)
        self.model = model_fingerprint(pipe)
        if isinstance(threshold, Threshold):
            threshold.check(pipe, self.protocol, seeds, fingerprint=self.model)
        # The denoiser that `_observe` has seen, its entry points, and the batch size.
        self._observed: tuple[torch.nn.Module, EntryPoints | None, int] | None = None
        self.verify, self._memorized_images = None, 1.0
        if verify is not None:
            self.verify, self._memorized_images = verify.resolved(pipe, threshold)
        self.threshold = float(threshold)
        if not -1 <= self.threshold <= 1:
            raise NemoError(f"threshold must be a similarity, from -1 to 1, got {self.threshold}")

    @property
    def settings(self) -> Settings:
        """The settings that a result depends on, besides the prompt."""
        return Settings(
            threshold=self.threshold,
            search=self.search,
            protocol=self.protocol,
            seeds=self.seeds,
            layers=self.layers,
            model=self.model,
            statistics=self.statistics.digest(),
            verification=None if self.verify is None else self.verify.to_dict(),
        )

    @plain_torch()
    def localize(self, prompt: str, progress: ProgressLike = None) -> Localization:
        """Find the neurons that carry this prompt's image, if it is memorized.

        Args:
            prompt: the text.
            progress: as for `nemo_ext.progress.open_progress`.

        Returns:
            The result. If the prompt is not memorized, it has no neurons.

        Raises:
            NemoError: activations or noise are not finite, the latents are smaller than the similarity's window, or the
                pipeline is not supported.
        """
        with open_progress(progress) as bars:
            return self._search(prompt, bars).found

    def _search(self, prompt: str, bars: Progress) -> _Searched:
        started = time.perf_counter()
        keep_freed_memory()
        with patch_handle(self.pipe) as handle:
            text = encode_prompts(self.pipe, [prompt])
            probe = self._probe(handle, text)
            with bars.task("score", self.seeds) as advance:
                score = probe.score().max
                advance(self.seeds)
            kept_seeds = probe.keep_above(self.threshold)
            images = self._image_runs(prompt, probe.runs.batch_size)
            missed = not kept_seeds and images is not None and max(images.before()) > self._memorized_images
            if missed:
                kept_seeds = probe.keep_above(-math.inf)
            outcome, verdict = Outcome(), None
            search, task = SEARCHES[self.search], self._task(probe, text, bars)
            if images is not None and self.verify is not None:
                with bars.task("images") as advance:
                    verifier = Verifier(
                        images, self.verify, prompt=prompt, originals=self._originals, on_images=lambda: advance(1)
                    )
                    if kept_seeds:
                        outcome, verdict = verifier.search(task, search, missed=missed)
                    else:
                        outcome, verdict = verifier.unsearched()
            elif kept_seeds:
                outcome = search(task)
            certificate = None
            if outcome.threshold_used is not None:
                with bars.task("certificate", len(outcome.neurons)) as advance:
                    certificate = certify(outcome.neurons, probe, outcome.threshold_used, on_trial=lambda: advance(1))
                if verdict is not None:
                    certificate = replace(
                        certificate, verified=verdict.silenced, image_similarity=verdict.final.highest
                    )
        height, width = probe.runs.latents.shape[-2:]
        settings = self.settings
        found = Localization(
            prompt=prompt,
            memorized=bool(kept_seeds),
            score_before=score,
            score_after=outcome.score_after,
            floor=outcome.floor,
            threshold=settings.threshold,
            threshold_used=outcome.threshold_used,
            notes=outcome.notes,
            theta=outcome.theta,
            top_k=outcome.top_k,
            initial_neurons=outcome.initial_neurons,
            neurons=outcome.neurons,
            kept_seeds=kept_seeds,
            unet_samples=round(probe.runs.samples + (0 if images is None else images.samples), 2),
            seconds=time.perf_counter() - started,
            certificate=certificate,
            search=settings.search,
            protocol=settings.protocol,
            seeds=settings.seeds,
            layers=settings.layers,
            similarity_scales=similarity_scales(height, width, self.protocol.window_sigma),
            model=settings.model,
            statistics=settings.statistics,
            history=tuple(probe.history),
            verification=settings.verification,
            verdict=verdict,
        )
        return _Searched(found, images)

    def _image_runs(self, prompt: str, batch_size: int) -> ImageRuns | None:
        if self.verify is None:
            return None
        assert self.verify.threshold is not None
        return ImageRuns(
            self.pipe,
            prompt,
            self.verify.resolved_sampling,
            self.verify.similarity,
            batch_size=batch_size,
            threshold=self.verify.threshold,
            originals=self._originals.get(prompt),
        )

    @cached_property
    def _originals(self) -> dict[str, Tensor]:
        """Descriptions of the known training images: prompt -> [O, …]."""
        if self.verify is None:
            return {}
        return {prompt: self.verify.similarity.describe(images) for prompt, images in self.verify.originals.items()}

    def _probe(self, handle: PatchHandle, text: TextEmbedding) -> NoiseProbe:
        entry_points, batch_size = self._observe(text)
        runs = Runs(
            self.pipe,
            handle,
            text,
            seeds=self.seeds,
            protocol=self.protocol,
            batch_size=batch_size,
            entry_points=entry_points,
        )
        return NoiseProbe(runs)

    def _task(self, probe: NoiseProbe, text: TextEmbedding, bars: Progress) -> Task:
        def activations() -> Mapping[str, Tensor]:
            stack = ValueStack(value_layers(self.pipe, self.layers))
            return {layer: values[0] for layer, values in stack.split(stack.activations(text.hidden)).items()}

        return Task(
            probe=probe,
            activations=activations,
            statistics=self.statistics,
            widths={layer: self.statistics.widths[layer] for layer in self.layers},
            threshold=self.threshold,
            protocol=self.protocol,
            bars=bars,
        )

    def _observe(self, text: TextEmbedding) -> tuple[EntryPoints | None, int]:
        """The denoiser's entry points and the batch size; computed once per denoiser, unless it is compiled."""
        family = family_of(self.pipe)
        denoiser = family.denoiser(self.pipe)
        family.latent_shape(self.pipe)  # raises an error for a denoiser that is not supported, before it runs
        known = self._observed
        # A denoiser can be compiled in place after it was observed.
        if known is None or known[0] is not denoiser or is_compiled(denoiser):
            batch_size = fitting_batch_size(self.pipe, text) if self.batch_size is None else self.batch_size
            with evaluating(self.pipe):
                found = EntryPoints.of(denoiser, self.layers, lambda rows: evaluate_zeros(self.pipe, text, rows))
            self._observed = known = denoiser, found, batch_size
        return known[1:]

    @plain_torch()
    def localize_many(
        self,
        prompts: Sequence[str],
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: ProgressLike = None,
        *,
        labels: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
    ) -> list[Localization]:
        """Localize several prompts one after another, and write each result to disk as soon as it is found.

        If it is stopped or killed at any moment, the same call continues.

        Args:
            prompts: the texts. A text that occurs several times is searched once.
            out: the folder for the results, which `nemo_ext.results.folder` describes; None: nothing is written.
            resume: if True, results that are already in the folder are reused, and new ones are added. If False, the
                new results replace those in the folder.
            progress: as for `nemo_ext.progress.open_progress`.
            labels: prompt -> label, for the prompts that have one; each new result keeps it.
            ranks: the processes that share the prompts (docs/scale.md), all of which make this call; None: this one
                alone.

        Returns:
            One result for each prompt, in the order of `prompts`.

        Raises:
            NemoError: the results in the folder were made with other settings, another process writes to the folder,
                a prompt is not text, several ranks have no folder or differ in something, or as for `localize`.
        """
        texts = check_prompts(prompts)
        ranks = ranks or Ranks()
        if out is None and ranks.count > 1:
            raise NemoError("several ranks meet in a folder: give one with out=")
        if out is not None and model_fingerprint(self.pipe) != self.model:
            raise NemoError("the model has changed since this Localizer was made: make a new one")
        with ExitStack() as stack:
            bars = stack.enter_context(open_progress(progress))
            advance = stack.enter_context(bars.task("prompts", len(set(texts))))

            def search(todo: Sequence[str]) -> Iterator[tuple[Localization, ImageRuns | None]]:
                for text in ranks.units(todo, advance):
                    found, images = self._search(text, bars)
                    yield replace(found, label=(labels or {}).get(text)), images

            if out is None:
                known = {found.prompt: found for found, _ in search(list(dict.fromkeys(texts)))}
            else:
                job = ResultsJob(ResultsFolder(out), texts, self.settings, ranks, anew=not resume)
                stack.enter_context(job)
                advance(len(set(texts)) - len(job.todo))
                for found, images in search(job.todo):
                    job.add(found, {} if images is None else self._pictures(found, images))
                known = job.finish()
        return [known[text] for text in texts]

    def _pictures(self, found: Localization, images: ImageRuns) -> dict[str, Image]:
        """The images that the verdict is about, under their names in the results folder."""
        assert self.verify is not None
        pictures = {image_name("before", seed): image for seed, image in images.images(NOTHING).items()}
        if found.memorized:
            after = images.images(found.neurons)
            pictures |= {image_name("after", seed): image for seed, image in after.items()}
        for original in self.verify.originals.get(found.prompt, ())[:1]:
            pictures[ORIGINAL] = original
        return pictures


def localize(
    pipe: Any,
    prompt: str,
    *,
    statistics: ActivationStatistics,
    threshold: float | Threshold,
    search: str = "grouped",
    protocol: Protocol | None = None,
    seeds: int = 10,
    batch_size: int | None = None,
    layers: str | Sequence[str] | None = None,
    verify: Verification | None = None,
    progress: ProgressLike = None,
) -> Localization:
    """Find the neurons of a pipeline that carry one prompt's image, if it is memorized (docs/method.md).

    For several prompts, a `Localizer` is faster than several calls of this function.

    Args:
        pipe, statistics, threshold, search, protocol, seeds, batch_size, layers, verify: as for `Localizer`.
        prompt: the text.
        progress: as for `nemo_ext.progress.open_progress`.

    Returns:
        The result. If the prompt is not memorized, it has no neurons.

    Raises:
        NemoError: as for `Localizer` and `Localizer.localize`.
    """
    localizer = Localizer(
        pipe,
        statistics=statistics,
        threshold=threshold,
        search=search,
        protocol=protocol,
        seeds=seeds,
        batch_size=batch_size,
        layers=layers,
        verify=verify,
    )
    return localizer.localize(prompt, progress)
