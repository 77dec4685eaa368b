"""The probe: what the searches ask about one prompt, namely the remaining memorization of a set of neurons."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.score import MemorizationScore, pairwise_score
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.answers import Answers
from nemo_ext.search.runs import Runs, Trial
from nemo_ext.search.seed_order import SeedOrder


class Probe(ABC):
    """The questions of the searches. Any function of a set of neurons can answer them, which the tests make use of."""

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
            neurons: the neurons to switch off.
            stop_above: if the result exceeds `stop_above`, any lower bound that also exceeds it may be returned early.
            seeds: kept seeds to look at; None: all kept seeds.
            ahead: sets that will probably be asked for next, the likeliest first. They are a hint and change no result.
        """

    @abstractmethod
    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        """The seed to try a set on first, besides those given; all seeds if one seed alone decides nothing."""

    @abstractmethod
    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        """The seed with the highest similarity that is known of a set; all seeds if one seed alone decides nothing."""


class NoiseProbe(Probe):
    """One prompt on one pipeline: its score, and the remaining memorization of sets of neurons.

    Equal seeds give equal numbers with any batch size, but for rounding. A larger batch has room for more trials ahead
    of their turn, some of which turn out to be useless.

    Args:
        runs: the runs of the prompt.

    Attributes:
        runs: the same.
        answers: what is known so far.
        kept_seeds: the seeds that `remaining` compares, counted from 0; at first all of them.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.answers = Answers(runs)
        self.kept_seeds = tuple(range(len(runs.latents)))
        self._order = SeedOrder(self.kept_seeds)

    def score(self) -> MemorizationScore:
        """The prompt's score, from the untouched δ of all seeds."""
        return pairwise_score(self.runs.untouched(), self.runs.protocol)

    def keep_above(self, threshold: float) -> tuple[int, ...]:
        """From now on compare only the seeds whose score is above the threshold, and return them."""
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
        """As `Probe.remaining`; an empty set has 1, without a run.

        With `stop_above` the likeliest seed runs first, and the others only if it is not above. All of them run in one
        call if an inferred data range makes a seed's similarity depend on the others, or if the denoiser is compiled.

        Raises:
            NemoError: no seed is kept, or the noise is not finite.
        """
        if not self.kept_seeds:
            raise NemoError("no seed is kept: the prompt isn't memorized, nothing can remain")
        if len(neurons) == 0:
            return 1.0
        limit = math.inf if stop_above is None else stop_above
        order = self._order.among(seeds)
        trials = [Trial(seed, neurons) for seed in order]
        later = self._trials_ahead(order[0], neurons, ahead)

        # Phase 1: do cached results already reject this set?
        if self._highest(neurons, order) > limit:
            return self._highest(neurons, order)
        # Phase 2: does the likeliest seed reject it? Not asked if a seed is known already, and so doesn't reject it.
        known = self.answers.of(neurons)
        one_at_a_time = stop_above is not None and not (self._all_at_once or any(seed in known for seed in order))
        if one_at_a_time:
            self.answers.find(trials[:1], later, limit)
            if self._highest(neurons, order) > limit:
                self._order.failed(order[0])
                return self._highest(neurons, order)
        # Phase 3: all seeds.
        new = any(seed not in self.answers.of(neurons) for seed in order)
        self.answers.find(trials, later, limit)
        highest = self._highest(neurons, order)
        if new or one_at_a_time:
            self._learn(neurons, order, limit, of_all_seeds=seeds is None)
        return highest

    def effects(self, layers: Sequence[str], seeds: Collection[int]) -> dict[str, Tensor]:
        """How much each neuron contributes to the remaining memorization, to first order.

        This is the sum of the seeds' slopes with all neurons of the layers at ½ (`Runs.slopes`). At 1 a similarity has
        its maximum and no slope, and at 0 nothing may be left that could change.

        Args:
            layers: names of value layers.
            seeds: some of the seeds.

        Returns:
            Layer name -> [N] float32; the larger, the more is gained by switching the neuron off.
        """
        slopes = [self.runs.slopes(seed, layers) for seed in seeds]
        return {layer: sum((slope[layer] for slope in slopes[1:]), slopes[0][layer]) for layer in layers}

    @property
    def _one_seed_decides_nothing(self) -> bool:
        """With an inferred data range a seed's similarity depends on which seeds are compared together."""
        return self.runs.protocol.data_range is None

    @property
    def _all_at_once(self) -> bool:
        return self._one_seed_decides_nothing or self.runs.compiled

    def _highest(self, neurons: NeuronSet, order: Sequence[int]) -> float:
        known = self.answers.of(neurons)
        return max((known[seed] for seed in order if seed in known), default=-math.inf)

    def _learn(self, neurons: NeuronSet, order: Sequence[int], limit: float, of_all_seeds: bool) -> None:
        """Tell the order of seeds what an evaluation of all seeds in `order` has shown."""
        known = self.answers.of(neurons)
        highest = max(order, key=lambda seed: known[seed])
        if known[highest] > limit:
            self._order.failed(highest)
        elif of_all_seeds:
            self._order.passed(known)

    def _trials_ahead(self, seed: int, neurons: NeuronSet, ahead: Iterable[NeuronSet]) -> list[Trial]:
        """The likeliest seed with the sets that will be asked for next, no more than a batch has room for."""
        if self._all_at_once:
            return []
        sets = dict.fromkeys(islice(ahead, self.runs.batch_size))
        return [Trial(seed, other) for other in sets if other != neurons and len(other) > 0]
