"""Answers: the similarities of all trials that have run, so that no trial runs twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nemo_ext.measure.similarity import similarity
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.runs import Runs, Trial


class Answers:
    """The similarity of each trial's δ with its seed's untouched δ (docs/method.md, section 7).

    Args:
        runs: the runs of one prompt.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._known: dict[NeuronSet, dict[int, float]] = {}

    def of(self, neurons: NeuronSet) -> Mapping[int, float]:
        """The known similarities of a set of neurons: seed -> similarity."""
        return self._known.get(neurons, {})

    def find(self, wanted: Sequence[Trial], ahead: Sequence[Trial] = (), limit: float = float("inf")) -> None:
        """Run the trials whose similarity is not known yet.

        Args:
            wanted: the trials. All of them are known afterwards.
            ahead: further trials, which run if a batch has room for them (`Runs.of`).
            limit: the module outputs of a trial are cached if its similarity is at most `limit`. A trial above it
                fails, and no later trial starts from a set that failed.
        """
        unknown = [trial for trial in wanted if trial.seed not in self.of(trial.neurons)]
        also = [trial for trial in ahead if trial.seed not in self.of(trial.neurons)]
        if not unknown:
            return
        # This runs first, because the trials can enter the denoiser with the rows that it caches.
        untouched = self._runs.untouched()
        runs = self._runs.of(unknown, also)
        differences = torch.cat([run.difference for run in runs])
        # All trials are compared in one call, because an inferred data range depends on all maps of the call.
        seeds = [run.trial.seed for run in runs]
        values = similarity(untouched[seeds], differences, self._runs.protocol).tolist()
        for run, value in zip(runs, values, strict=True):
            self._known.setdefault(run.trial.neurons, {})[run.trial.seed] = value
            if value <= limit:
                self._runs.keep(run)
