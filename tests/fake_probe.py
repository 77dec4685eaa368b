"""A probe without a model: the searches need one number for a set of neurons, so any function will do."""

import itertools
from collections.abc import Callable, Sequence

from nemo_ext.neurons import NeuronSet

Score = Callable[[NeuronSet], float]


class FakeProbe:
    """Answers with `score(neurons)` in full, whatever is enough, and keeps every set that it was asked for."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.asked: list[NeuronSet] = []

    def remaining(
        self, neurons: NeuronSet, enough: float | None = None, seeds: object = None, ahead: object = ()
    ) -> float:
        self.asked.append(neurons)
        return self.score(neurons)

    def likeliest(self, besides: Sequence[int] = ()) -> tuple[int, ...]:
        return () if 0 in besides else (0,)


def additive(weights: dict[tuple[str, int], float]) -> Score:
    """1 minus the weights of the neurons that are off: monotone, every neuron by itself."""
    return lambda neurons: 1 - sum(weights.get(pair, 0.0) for pair in neurons.pairs())


def pairwise(weights: dict[tuple[str, int], float], between: dict[frozenset[tuple[str, int]], float]) -> Score:
    """`additive` and a term, of either sign, for every two neurons that are off: not monotone."""

    def score(neurons: NeuronSet) -> float:
        pairs = itertools.combinations(neurons.pairs(), 2)
        return additive(weights)(neurons) - sum(between.get(frozenset(pair), 0.0) for pair in pairs)

    return score
