"""Runs of the denoiser: which trials share a call, where each call enters the denoiser, and how samples are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_ext.measure.memory import fitting_batch_size, free_bytes
from nemo_ext.measure.noise import noise_differences, noise_predictor
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import seed_latents
from nemo_ext.models.family import TextEmbedding
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import is_compiled
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import PatchHandle
from nemo_ext.patching.rows import neurons_off_by_row
from nemo_ext.search.cached_rows import CachedRows
from nemo_ext.search.partial_unet import FULL_RUN, EntryPoints, Row

#: The largest total size of all cached rows, in bytes. About 40 rows of Stable Diffusion 1 in float32 fit in.
CACHE_BYTES = 4 << 30
#: The largest total size of all cached rows, as a share of the memory that is free when a search begins.
CACHE_SHARE = 0.25


class Trial(NamedTuple):
    """One seed with a set of neurons off."""

    seed: int
    neurons: NeuronSet


class Run(NamedTuple):
    """The result of a run of the denoiser for one trial.

    Attributes:
        trial: the trial.
        difference: its δ, [1, C, H, W] float32.
        row: the module outputs with which a later run can enter the denoiser.
    """

    trial: Trial
    difference: Tensor
    row: Row


class Runs:
    """Runs the denoiser for one prompt, in batches, and counts the samples.

    Args:
        pipe: a pipeline.
        handle: the handle of its patch, with no neuron off. After every method no neuron is off.
        text: the prompt's embedding.
        seeds: S ≥ 2.
        protocol: how to measure.
        batch_size: latents in one call of the denoiser, at most `seeds`. None: as many as memory allows
            (`fitting_batch_size`). A compiled denoiser always gets calls of this size; they are padded with latents
            whose noise is discarded.
        entry_points: the places where the denoiser can be entered; None: every run is a full run.

    Attributes:
        latents: x_T of every seed, [S, C, H, W].
        samples: the number of latents that the denoiser has evaluated so far. A run through a part of the denoiser
            counts as that part's share of FLOPs.
        compiled: whether the denoiser is compiled.

    Raises:
        NemoError: there are fewer than two seeds, or the latents are too small to be compared.
    """

    def __init__(
        self,
        pipe: Any,
        handle: PatchHandle,
        text: TextEmbedding,
        *,
        seeds: int,
        protocol: Protocol,
        batch_size: int | None = None,
        entry_points: EntryPoints | None = None,
    ) -> None:
        self.protocol = protocol
        self.latents = seed_latents(pipe, seeds, protocol)
        self.batch_size = min(seeds, fitting_batch_size(pipe, text) if batch_size is None else batch_size)
        self.samples = 0.0
        denoiser: Any = family_of(pipe).denoiser(pipe)
        self.compiled = is_compiled(denoiser)
        self._pipe = pipe
        self._handle = handle
        self._text = text
        # Made once, because for an inpainting model it encodes an image.
        self._predict = noise_predictor(pipe, protocol)
        self._untouched: Tensor | None = None
        memory = min(CACHE_BYTES, int(CACHE_SHARE * free_bytes(denoiser.device)))
        self._cache = CachedRows(entry_points, seeds, memory)

    def untouched(self) -> Tensor:
        """δ of every seed with no neuron off, [S, C, H, W] float32. It is computed by the first call."""
        if self._untouched is None:
            differences = []
            for seeds in torch.arange(len(self.latents)).split(self.batch_size):
                trials = [Trial(seed, NeuronSet()) for seed in seeds.tolist()]
                for run in self._call(trials, FULL_RUN, [{}] * len(trials)):
                    differences.append(run.difference)
                    self.keep(run)
            self._untouched = torch.cat(differences)
        return self._untouched

    def of(self, wanted: Sequence[Trial], ahead: Sequence[Trial] = ()) -> list[Run]:
        """Run trials, each from the latest possible entry point.

        Args:
            wanted: the trials.
            ahead: further trials. Such a trial runs if it enters the denoiser where a trial of `wanted` does, and if
                the batch has room for it.

        Returns:
            One run for each trial that ran, grouped by entry point.
        """
        entries = {trial: self._cache.entry(*trial) for trial in (*wanted, *ahead)}
        runs: list[Run] = []
        # A dict keeps the order of `wanted`, so that every process makes the same calls.
        for start in dict.fromkeys(entries[trial][0] for trial in wanted):
            trials = [trial for trial in wanted if entries[trial][0] == start]
            also = [trial for trial in ahead if entries[trial][0] == start]
            trials += also[: -len(trials) % self.batch_size]
            for first in range(0, len(trials), self.batch_size):
                batch = trials[first : first + self.batch_size]
                with neurons_off_by_row(self._handle, [trial.neurons for trial in batch]):
                    runs += self._call(batch, start, [entries[trial][1] for trial in batch])
        return runs

    def keep(self, run: Run) -> None:
        """Cache the module outputs of a run. A later trial can enter the denoiser where it first differs from it."""
        self._cache.keep(*run.trial, run.row)

    def _call(self, trials: Sequence[Trial], start: int, entering: Sequence[Row]) -> list[Run]:
        """Call the denoiser once from an entry point on. The neurons that are off now stay off."""
        rows = self.batch_size if self.compiled else len(trials)
        seeds = [trial.seed for trial in trials]
        with self._cache.entering(start, entering) as recorded:
            differences = noise_differences(
                self._pipe, self._text, self.latents[seeds], self.protocol, batch_size=rows, predict=self._predict
            )
        self.samples += rows * self._cache.share(start)
        return [Run(*parts) for parts in zip(trials, differences.split(1), recorded, strict=True)]
