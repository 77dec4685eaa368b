"""The probe that judges sets of neurons by the images themselves, within a budget (docs/method.md, section 12)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import ImageTrial, Limits
from nemo_ext.search.image_runs import ImageRuns
from nemo_ext.search.probe import Probe
from nemo_ext.search.seed_order import SeedOrder


class BudgetSpent(Exception):
    """The budget of images is spent. It never leaves the search."""


class ImageProbe(Probe):
    """Measures images with a set of neurons off, where `NoiseProbe` compares first steps. The threshold is 1.

    Args:
        runs: the images of the prompt.
        limits: from which similarity on an image counts as a copy.
        budget: how many images may be generated with neurons off, beyond those that exist already.
        failed: the trial of a set that has left copies. The seed of its clearest copy is looked at first.

    Attributes:
        best: the last set that has passed with all seeds, which is the smallest, because the searches shrink sets; None
            if none has.
    """

    def __init__(self, runs: ImageRuns, limits: Limits, budget: int, failed: ImageTrial) -> None:
        self.best: NeuronSet | None = None
        self._runs = runs
        self._limits = limits
        self._last = runs.generated + budget
        excess = limits.excess(failed)
        self._order = SeedOrder(sorted(runs.places, key=lambda place: -excess[place]))

    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        return tuple(place for place in self._order.among() if place not in besides)[:1]

    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        known = self._runs.known(neurons)
        values = dict(zip(known, self._excess(neurons, known), strict=True))
        return tuple(sorted(values, key=lambda place: -values[place])[:1])

    def _excess(self, neurons: NeuronSet, places: Sequence[int]) -> tuple[float, ...]:
        """For some seeds, how many times the limit the similarities are; among each other, if these are all seeds."""
        everyone = len(places) == len(self._runs.places)
        diversity = self._runs.diversity(neurons) if everyone else ()
        remaining = self._runs.remaining(neurons, self._runs.places if everyone else places)
        return self._limits.excess(ImageTrial(len(neurons), "", None, remaining, diversity))

    def remaining(
        self,
        neurons: NeuronSet,
        stop_above: float | None = None,
        seeds: Collection[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        """How many times the limit the highest similarity is; if `seeds` is None, also among the images themselves.

        Seeds run one after another if `stop_above` is given, so that a set that fails with its first image costs no
        other. `ahead` is not used. For an empty set the result is 1, without an image.

        Raises:
            BudgetSpent: an image is missing, and the budget has none left.
        """
        if len(neurons) == 0:
            return 1.0
        highest = -math.inf
        order = self._order.among(seeds)
        for group in [[place] for place in order] if stop_above is not None else [order]:
            missing = len(set(group) - set(self._runs.known(neurons)))
            if self._runs.generated + missing > self._last:
                raise BudgetSpent
            highest = max(highest, *self._excess(neurons, group))
            if stop_above is not None and highest > stop_above:
                self._order.failed(group[0])
                return highest
        if seeds is None:
            highest = max(highest, *self._excess(neurons, self._runs.places))
            if highest <= 1:
                self.best = neurons
        return highest
