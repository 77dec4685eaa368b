"""The probe: it measures the remaining memorization of one prompt with a set of neurons off, for the searches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from nemo_ext.errors import NemoError
from nemo_ext.measure.score import MemorizationScore, pairwise_score
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.answers import Answers
from nemo_ext.search.runs import Runs, Trial
from nemo_ext.search.seed_order import SeedOrder


class Probe(ABC):
    """The interface between the searches and a prompt. Tests implement it with a plain function of a set of neurons."""

    @abstractmethod
    def remaining(
        self,
        neurons: NeuronSet,
        stop_above: float | None = None,
        seeds: Collection[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        """The remaining memorization with these neurons off, and no others (docs/method.md, section 7).

        Args:
            neurons: the neurons that are off.
            stop_above: if the result exceeds `stop_above`, any lower bound that also exceeds it may be returned early.
            seeds: the kept seeds that are compared; None: all kept seeds.
            ahead: sets that will probably be measured next, the likeliest first. They are a hint and change no result.

        Returns:
            A similarity, at most 1.
        """

    @abstractmethod
    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        """The seed that will most likely show that a set is not enough, as a tuple of one seed.

        If the similarity of a seed depends on the other seeds (`Protocol.data_range` is None), it is a tuple of all
        seeds.

        Args:
            besides: seeds that are left out.

        Returns:
            The seeds; an empty tuple if all seeds are left out.
        """

    @abstractmethod
    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        """The seed with the highest known similarity of a set, as a tuple of one or all seeds as for `likeliest`."""


class NoiseProbe(Probe):
    """Measures a prompt on a pipeline: its score, and the remaining memorization with sets of neurons off.

    Equal seeds give equal results with any batch size, up to rounding. A larger batch has room for more trials ahead of
    their turn, and some of these are never needed.

    Args:
        runs: the runs of the prompt.

    Attributes:
        runs: the runs of the prompt.
        answers: the similarities that are known so far.
        kept_seeds: the seeds that `remaining` compares, counted from 0; at first all of them.
        history: what `remaining` has returned so far, in order: how many neurons were off, and the result.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.answers = Answers(runs)
        self.history: list[tuple[int, float]] = []
        self.kept_seeds = tuple(range(len(runs.latents)))
        self._order = SeedOrder(self.kept_seeds)

    def score(self) -> MemorizationScore:
        """The prompt's score, from the untouched δ of all seeds."""
        return pairwise_score(self.runs.untouched(), self.runs.protocol)

    def keep_above(self, threshold: float) -> tuple[int, ...]:
        """Keep only the seeds whose score is above the threshold (docs/method.md, section 5), and return them."""
        per_seed = self.score().per_seed
        self.kept_seeds = tuple(s for s, score in enumerate(per_seed) if score > threshold)
        self._order = SeedOrder(sorted(self.kept_seeds, key=lambda s: -per_seed[s]))
        self.answers = Answers(self.runs)
        return self.kept_seeds

    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        others = tuple(seed for seed in self._order.among() if seed not in besides)
        return others if self._one_seed_decides_nothing else others[:1]

    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        known = self.answers.of(neurons)
        order = sorted((seed for seed in self._order.among() if seed in known), key=lambda seed: -known[seed])
        return self._order.among() if self._one_seed_decides_nothing else tuple(order[:1])

    def remaining(
        self,
        neurons: NeuronSet,
        stop_above: float | None = None,
        seeds: Collection[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        """Do what `Probe.remaining` describes. For an empty set the result is 1, without a run.

        With `stop_above`, the likeliest seed runs first, and the other seeds run only if its similarity is not above
        `stop_above`. All seeds run together if an inferred data range makes a seed's similarity depend on the other
        seeds, or if the denoiser is compiled.

        Raises:
            NemoError: no seed is kept, which means that the prompt is not memorized; or the noise is not finite.
        """
        if not self.kept_seeds:
            raise NemoError("no seed is kept, because the prompt is not memorized: there is no remaining memorization")
        if len(neurons) == 0:
            return 1.0
        highest = self._measure(neurons, stop_above, seeds, ahead)
        self.history.append((len(neurons), highest))
        return highest

    def _measure(
        self,
        neurons: NeuronSet,
        stop_above: float | None,
        seeds: Collection[int] | None,
        ahead: Iterable[NeuronSet],
    ) -> float:
        limit = math.inf if stop_above is None else stop_above
        order = self._order.among(seeds)
        trials = [Trial(seed, neurons) for seed in order]
        later = self._trials_ahead(order[0], neurons, ahead)

        # Phase 1: do cached results already reject this set?
        if self._highest(neurons, order) > limit:
            return self._highest(neurons, order)
        # Phase 2: does the likeliest seed reject it? This is skipped if the similarity of any seed is known already.
        known = self.answers.of(neurons)
        one_at_a_time = stop_above is not None and not (self._all_at_once or any(seed in known for seed in order))
        if one_at_a_time:
            self.answers.find(trials[:1], later, limit)
            if self._highest(neurons, order) > limit:
                self._order.failed(order[0])
                return self._highest(neurons, order)
        # Phase 3: run all seeds.
        new = any(seed not in self.answers.of(neurons) for seed in order)
        self.answers.find(trials, later, limit)
        highest = self._highest(neurons, order)
        if new or one_at_a_time:
            self._learn(neurons, order, limit, of_all_seeds=seeds is None)
        return highest

    @property
    def _one_seed_decides_nothing(self) -> bool:
        """Whether a seed's similarity depends on the other seeds of the call, as with an inferred data range."""
        return self.runs.protocol.data_range is None

    @property
    def _all_at_once(self) -> bool:
        return self._one_seed_decides_nothing or self.runs.compiled

    def _highest(self, neurons: NeuronSet, order: Sequence[int]) -> float:
        known = self.answers.of(neurons)
        return max((known[seed] for seed in order if seed in known), default=-math.inf)

    def _learn(self, neurons: NeuronSet, order: Sequence[int], limit: float, of_all_seeds: bool) -> None:
        """Update the order of the seeds after a measurement of all seeds in `order`."""
        known = self.answers.of(neurons)
        highest = max(order, key=lambda seed: known[seed])
        if known[highest] > limit:
            self._order.failed(highest)
        elif of_all_seeds:
            self._order.passed(known)

    def _trials_ahead(self, seed: int, neurons: NeuronSet, ahead: Iterable[NeuronSet]) -> list[Trial]:
        """Trials of one seed with the sets in `ahead`, at most as many as fit into a batch."""
        if self._all_at_once:
            return []
        sets = dict.fromkeys(islice(ahead, self.runs.batch_size))
        return [Trial(seed, other) for other in sets if other != neurons and len(other) > 0]
