"""A probe without a model: the searches need one number for a set of neurons, so any function will do."""

import itertools
import random
from collections.abc import Callable, Collection, Iterable

from nemo_ext.neurons import Neuron, NeuronSet
from nemo_ext.search.probe import Probe

Score = Callable[[NeuronSet], float]

#: Layers in network order, with nine neurons each in random scores.
LAYERS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0")
PAIRS: list[Neuron] = list(itertools.product(LAYERS, range(9)))


class FakeProbe(Probe):
    """Answers with `score(neurons)` exactly, whatever `stop_above` is, and keeps every set that it was asked for."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.asked: list[NeuronSet] = []

    def remaining(
        self,
        neurons: NeuronSet,
        stop_above: float | None = None,
        seeds: Collection[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        self.asked.append(neurons)
        return self.score(neurons)

    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        return () if 0 in besides else (0,)

    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        return (0,)


class SeedsProbe(Probe):
    """A score for each seed; evaluates as many as it wants, like `NoiseProbe`."""

    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores
        self.first = 0
        self.trials: set[tuple[NeuronSet, int]] = set()

    def remaining(
        self,
        neurons: NeuronSet,
        stop_above: float | None = None,
        seeds: Collection[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        looked_at = range(len(self.scores)) if seeds is None else seeds
        self.trials |= {(neurons, seed) for seed in looked_at}
        values = {seed: self.scores[seed](neurons) for seed in looked_at}
        highest = max(values, key=lambda seed: values[seed])
        if stop_above is not None and values[highest] > stop_above:
            self.first = highest
        return values[highest]

    def likeliest(self, besides: Collection[int] = ()) -> tuple[int, ...]:
        order = sorted(range(len(self.scores)), key=lambda seed: seed != self.first)
        return tuple(seed for seed in order if seed not in besides)[:1]

    def hardest(self, neurons: NeuronSet) -> tuple[int, ...]:
        asked = [seed for seed in range(len(self.scores)) if (neurons, seed) in self.trials]
        return (max(asked, key=lambda seed: self.scores[seed](neurons)),)


def additive(weights: dict[Neuron, float]) -> Score:
    """1 minus the weights of the neurons that are off: monotone, every neuron by itself."""
    return lambda neurons: 1 - sum(weights.get(pair, 0.0) for pair in neurons.pairs())


def pairwise(weights: dict[Neuron, float], between: dict[frozenset[Neuron], float]) -> Score:
    """`additive` and a term, of either sign, for every two neurons that are off: not monotone."""

    def score(neurons: NeuronSet) -> float:
        pairs = itertools.combinations(neurons.pairs(), 2)
        return additive(weights)(neurons) - sum(between.get(frozenset(pair), 0.0) for pair in pairs)

    return score


def random_score(rng: random.Random, kind: str) -> Score:
    """A random score of the neurons in `PAIRS`: "monotone", "pairwise" or "lawless"."""
    weights = {neuron: max(0.0, rng.gauss(-0.05, 0.15)) for neuron in PAIRS}
    if kind == "monotone":
        return additive(weights)
    if kind == "pairwise":
        return pairwise(weights, {frozenset(pair): rng.gauss(0, 0.05) for pair in itertools.combinations(PAIRS, 2)})
    table: dict[NeuronSet, float] = {}
    return lambda asked: table.setdefault(asked, random.Random(repr((asked, weights))).random())


def random_candidates(rng: random.Random, duplicates: bool) -> dict[str, list[int]]:
    chosen = {layer: rng.sample(range(9), rng.randrange(5)) for layer in LAYERS}
    if duplicates:
        for indices in chosen.values():
            indices += rng.sample(indices, rng.randrange(len(indices) + 1))
    return chosen
