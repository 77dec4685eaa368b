"""From a prompt to the neurons that carry its image: the whole search, for one prompt or for many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

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
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, is_compiled
from nemo_ext.models.text import check_prompts, encode_prompts
from nemo_ext.patching.patch import PatchHandle, patch_handle
from nemo_ext.progress import Progress, ProgressLike, open_progress
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import Localization, Settings
from nemo_ext.search.exhaustive import search_exhaustive
from nemo_ext.search.guided import search_guided
from nemo_ext.search.outcome import Outcome, Task
from nemo_ext.search.partial_unet import EntryPoints
from nemo_ext.search.probe import NoiseProbe
from nemo_ext.search.runs import Runs

#: The searches, under the names that `search=` takes.
SEARCHES: Mapping[str, Callable[[Task], Outcome]] = {"exhaustive": search_exhaustive, "guided": search_guided}


class Localizer:
    """Finds the neurons of one pipeline that carry memorized images (docs/method.md).

    It leaves the pipeline exactly as it was, patched or not, also after an exception. Equal seeds give equal neurons in
    every run and for any batch size.

    Args:
        pipe: a pipeline. Neurons that a patch has switched off are on during the search.
        statistics: μ and σ of this model's activations.
        threshold: τ, as a number or as `memorization_threshold` returned it; then it must be of this model, protocol
            and number of seeds.
        search: "exhaustive", the paper's search; or "guided", which ranks all searched neurons by a gradient and
            bisects: far less work, for a set that need not be the paper's.
        protocol: how to measure and search; None: `Protocol.paper()`.
        seeds: S ≥ 2.
        batch_size: latents in one call of the denoiser; None: as many as memory allows (`fitting_batch_size`).
        layers: which layers to search, as for `value_layers`; None: those of the statistics.

    Raises:
        NemoError: the statistics or the threshold are of another model, layers have no statistics, or the search is
            unknown.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        statistics: ActivationStatistics,
        threshold: float | Threshold,
        search: str = "exhaustive",
        protocol: Protocol | None = None,
        seeds: int = 10,
        batch_size: int | None = None,
        layers: str | Sequence[str] | None = None,
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
        if isinstance(threshold, Threshold):
            threshold.check(pipe, self.protocol, seeds)
        self._observed: tuple[torch.nn.Module, EntryPoints | None, int] | None = None
        self.threshold = float(threshold)
        if not -1 <= self.threshold <= 1:
            raise NemoError(f"threshold must be a similarity, from -1 to 1, got {self.threshold}")

    @property
    def settings(self) -> Settings:
        """What a result depends on besides the prompt."""
        return Settings(
            threshold=self.threshold,
            search=self.search,
            protocol=self.protocol,
            seeds=self.seeds,
            layers=self.layers,
            model=self.statistics.fingerprint,
            statistics=self.statistics.digest(),
        )

    def localize(self, prompt: str, progress: ProgressLike = None) -> Localization:
        """Find the neurons that carry this prompt's image, if it is memorized.

        Args:
            prompt: the text.
            progress: see `nemo_ext.progress`.

        Raises:
            NemoError: activations or noise are not finite, or the latents are too small for the similarity's window.
        """
        started = time.perf_counter()
        keep_freed_memory()
        with open_progress(progress) as bars, patch_handle(self.pipe) as handle:
            hidden = encode_prompts(self.pipe, [prompt])
            probe = self._probe(handle, hidden)
            with bars.task("score", self.seeds) as advance:
                score = probe.score().max
                advance(self.seeds)
            kept = probe.keep_above(self.threshold)
            outcome = SEARCHES[self.search](self._task(probe, hidden, bars)) if kept else Outcome()
        height, width = probe.runs.latents.shape[-2:]
        settings = self.settings
        return Localization(
            prompt=prompt,
            memorized=bool(kept),
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
            kept_seeds=kept,
            unet_samples=round(probe.runs.samples, 2),
            seconds=time.perf_counter() - started,
            certificate=outcome.certificate,
            search=settings.search,
            protocol=settings.protocol,
            seeds=settings.seeds,
            layers=settings.layers,
            similarity_scales=similarity_scales(height, width, self.protocol.window_sigma),
            model=settings.model,
            statistics=settings.statistics,
        )

    def _probe(self, handle: PatchHandle, hidden: Tensor) -> NoiseProbe:
        entry_points, batch_size = self._observe(hidden)
        runs = Runs(
            self.pipe,
            handle,
            hidden,
            seeds=self.seeds,
            protocol=self.protocol,
            batch_size=batch_size,
            entry_points=entry_points,
        )
        return NoiseProbe(runs)

    def _task(self, probe: NoiseProbe, hidden: Tensor, bars: Progress) -> Task:
        def activations() -> Mapping[str, Tensor]:
            stack = ValueStack(value_layers(self.pipe, self.layers))
            return {layer: values[0] for layer, values in stack.split(stack.activations(hidden)).items()}

        return Task(
            probe=probe,
            activations=activations,
            statistics=self.statistics,
            widths={layer: self.statistics.widths[layer] for layer in self.layers},
            threshold=self.threshold,
            protocol=self.protocol,
            bars=bars,
        )

    def _observe(self, hidden: Tensor) -> tuple[EntryPoints | None, int]:
        """Where the denoiser can be entered, and how many latents a call may have; found once for each denoiser."""
        family = family_of(self.pipe)
        denoiser = family.denoiser(self.pipe)
        family.latent_shape(self.pipe)  # refuses what is not supported before anything runs
        known = self._observed
        # A denoiser can be compiled in place after it was observed.
        if known is None or known[0] is not denoiser or is_compiled(denoiser):
            batch_size = fitting_batch_size(self.pipe, hidden) if self.batch_size is None else self.batch_size
            with evaluating(self.pipe):
                found = EntryPoints.of(denoiser, self.layers, lambda rows: evaluate_zeros(self.pipe, hidden, rows))
            self._observed = known = denoiser, found, batch_size
        return known[1:]

    def localize_many(
        self,
        prompts: Sequence[str],
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: ProgressLike = None,
    ) -> list[Localization]:
        """Localize one prompt after another, keeping every result on disk as soon as it is there.

        Args:
            prompts: texts; one that stands twice is searched once.
            out: folder for the results, one line for each prompt, written as soon as it is found
                (`nemo_ext.results.folder`); None: nothing is written.
            resume: take prompts that the folder already has from there. False: it is begun anew.
            progress: see `nemo_ext.progress`.

        Returns:
            One result for each prompt, in the order of `prompts`.

        Raises:
            NemoError: the folder's results were made with other settings, another process writes to it, or as for
                `localize`.
        """
        texts = check_prompts(prompts)
        known: dict[str, Localization] = {}
        with ExitStack() as stack:
            writer = None
            if out is not None:
                writer = stack.enter_context(ResultsFolder(out).writing(anew=not resume))
                for found in writer.kept:
                    self._check_settings(found, writer.path)
                known = {found.prompt: found for found in writer.kept}
            bars = stack.enter_context(open_progress(progress))
            advance = stack.enter_context(bars.task("prompts", len(texts)))
            for text in texts:
                if text not in known:
                    known[text] = self.localize(text, bars)
                    if writer is not None:
                        writer.append(known[text])
                advance(1)
        return [known[text] for text in texts]

    def _check_settings(self, found: Localization, path: Path) -> None:
        there, now = found.settings, self.settings
        for field in fields(Settings):
            old, new = getattr(there, field.name), getattr(now, field.name)
            if old != new:
                raise NemoError(
                    f"{path} has results with another {field.name}: {old}, now {new}; choose another "
                    "folder, or resume=False to begin anew"
                )


def localize(
    pipe: Any,
    prompt: str,
    *,
    statistics: ActivationStatistics,
    threshold: float | Threshold,
    search: str = "exhaustive",
    protocol: Protocol | None = None,
    seeds: int = 10,
    batch_size: int | None = None,
    layers: str | Sequence[str] | None = None,
    progress: ProgressLike = None,
) -> Localization:
    """Find the neurons of a pipeline that carry one prompt's image, if it is memorized.

    For several prompts make one `Localizer`, whose arguments these are, and use it again.

    Args:
        prompt: the text.
        progress: see `nemo_ext.progress`.
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
    )
    return localizer.localize(prompt, progress)
