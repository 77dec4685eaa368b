"""Answers: what is known about trials, so that no trial is run twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nemo_ext.measure.similarity import similarity
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.runs import Runs, Trial


class Answers:
    """For each trial that has run, the similarity of its δ and its seed's untouched δ.

    Args:
        runs: the runs of one prompt.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._known: dict[NeuronSet, dict[int, float]] = {}

    def of(self, neurons: NeuronSet) -> Mapping[int, float]:
        """What is known of a set of neurons: seed -> similarity."""
        return self._known.get(neurons, {})

    def find(self, wanted: Sequence[Trial], ahead: Sequence[Trial] = (), limit: float = float("inf")) -> None:
        """Run trials that are not known yet.

        Args:
            wanted: trials that become known.
            ahead: trials that may become known as well, where a batch has room (`Runs.of`).
            limit: the module outputs of a trial are cached if its similarity is not above this. A trial above it fails,
                and no later trial starts from a set that failed.
        """
        unknown = [trial for trial in wanted if trial.seed not in self.of(trial.neurons)]
        also = [trial for trial in ahead if trial.seed not in self.of(trial.neurons)]
        if not unknown:
            return
        # Before any neuron is off, because its rows are cached for the trials.
        untouched = self._runs.untouched()
        runs = self._runs.of(unknown, also)
        differences = torch.cat([run.difference for run in runs])
        # One call for all, because an inferred data range depends on all maps of a call.
        seeds = [run.trial.seed for run in runs]
        values = similarity(untouched[seeds], differences, self._runs.protocol).tolist()
        for run, value in zip(runs, values, strict=True):
            self._known.setdefault(run.trial.neurons, {})[run.trial.seed] = value
            if value <= limit:
                self._runs.keep(run)
