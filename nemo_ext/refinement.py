"""Refinement and certificate: the candidates that must stay off, and the proof (docs/method.md, sections 9 and 10)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Certificate, NeuronScore
from nemo_ext.scoring import Probe

#: Layer name and index.
Neuron = tuple[str, int]

# Of the guided search: how many neurons at the front of a good order are enough, and how many orders are tried.
_FRONT = 8
_ORDERS = 3


@dataclass(frozen=True)
class Refinement:
    """What is left of the candidates.

    Attributes:
        neurons: the neurons that have to be off.
        remaining: remaining memorization with them off.
    """

    neurons: NeuronSet
    remaining: float


def refine_exhaustive(
    candidates: Mapping[str, Sequence[int]],
    probe: Probe,
    threshold: float,
    *,
    on_trial: Callable[[], None] | None = None,
) -> Refinement:
    """Switch candidates on again, layer by layer, then one by one, as far as τ allows (docs/method.md, section 9).

    Layers deepest first: a whole layer's candidates come on; if the remaining memorization stays
    below τ they were not needed. Then, in the layers left, deepest first, the same for each
    neuron in the order given. At most one trial for each layer and one for each candidate. This is
    the paper's search, the reference for faster ones; deterministic.

    Args:
        candidates: layer name -> indices, layers in network order (a `NeuronSet` is). Of an index
            that stands twice one is switched on at a time, so that the neuron stays off once more.
        probe: tells the remaining memorization.
        threshold: τ; what keeps a neuron on is less than τ, not equal.
        on_trial: called after every trial.

    Returns:
        The neurons left.
    """
    off = {layer: list(indices) for layer, indices in candidates.items() if indices}

    def switch_on(steps: Sequence[tuple[str, Sequence[int]]]) -> None:
        nonlocal off
        for number, step in enumerate(steps):
            trial = _without(off, step)
            # Most candidates turn out to be needless: the next trial will most likely start from this one.
            ahead = [NeuronSet(_without(trial, next_step)) for next_step in steps[number + 1 : number + 2]]
            remaining = probe.remaining(NeuronSet(trial), enough=_just_below(threshold), ahead=ahead)
            if on_trial is not None:
                on_trial()
            if remaining < threshold:
                off = trial

    switch_on([(layer, off[layer]) for layer in reversed(off)])
    switch_on([(layer, [index]) for layer in reversed(off) for index in off[layer]])
    neurons = NeuronSet(off)
    return Refinement(neurons, probe.remaining(neurons))


def _without(off: Mapping[str, Sequence[int]], step: tuple[str, Sequence[int]]) -> dict[str, list[int]]:
    """What stays off when some neurons of a layer are switched on: each index once for each time that it is given."""
    left = {layer: list(indices) for layer, indices in off.items()}
    layer, switched_on = step
    for index in switched_on:
        left[layer].remove(index)
    return left


def refine_guided(
    ranked: Callable[[Sequence[int]], Sequence[Neuron]],
    probe: Probe,
    threshold: float,
    *,
    on_trial: Callable[[], None] | None = None,
) -> Refinement:
    """A smallest set of neurons that is enough, from the front of an order that puts the most effective ones first.

    The shortest prefix of the order that is enough is found by doubling and bisecting; its last neuron is needed. With
    that one off the rest of the prefix is searched in the same way, until the neurons found are enough by themselves:
    some k log n trials for k of n neurons. Neurons that later ones have made needless come on again. All this sees the
    likeliest seed alone; the set is then checked on all kept seeds, and where one of them is still above τ, the search
    is made anew with that seed as well, in the order of the effects on it. An order whose first few neurons are not
    enough may be a seed's on which the effects say little: up to two others are asked for theirs. The set is enough, at
    τ or below, and 1-minimal: any one neuron on again leaves τ or more.

    Args:
        ranked: every neuron that may be switched off, as (layer name, index), in the order of their effect on the
            seeds given.
        probe: tells the remaining memorization.
        threshold: τ.
        on_trial: called after every trial.

    Returns:
        The neurons left; all of them, with a remaining memorization above τ, where not even that is enough.
    """
    hardest = probe.likeliest()
    seeds = list(hardest)

    def enough(pairs: Sequence[Neuron]) -> bool:
        remaining = probe.remaining(_as_set(pairs), enough=threshold, seeds=seeds)
        if on_trial is not None:
            on_trial()
        return remaining <= threshold

    while enough(order := ranked(hardest)):
        asked = list(hardest)
        while len(asked) < _ORDERS and not enough(order[:_FRONT]) and (others := probe.likeliest(besides=asked)):
            order = ranked(others)
            asked += others
        neurons = _as_set(_without_needless(_shortest(order, enough), probe, threshold, seeds))
        remaining = probe.remaining(neurons, enough=threshold)
        if remaining <= threshold:
            return Refinement(neurons, remaining)
        hardest = probe.likeliest()
        seeds += hardest
    everything = _as_set(order)
    return Refinement(everything, probe.remaining(everything))


def _shortest(order: Sequence[Neuron], enough: Callable[[Sequence[Neuron]], bool]) -> list[Neuron]:
    """A set that is enough, and whose every neuron was needed when it was taken; all of `order` is known to be."""
    found: list[Neuron] = []
    while not (found and enough(found)):
        few, many, size = 0, len(order), 1
        while size < many and not enough([*found, *order[:size]]):
            few, size = size, 2 * size
        many = min(size, many)
        while many - few > 1:
            middle = (few + many) // 2
            if enough([*found, *order[:middle]]):
                many = middle
            else:
                few = middle
        found.append(order[many - 1])
        order = order[: many - 1]
    return found


def _without_needless(found: Sequence[Neuron], probe: Probe, threshold: float, seeds: Sequence[int]) -> list[Neuron]:
    """Switch on again, the least effective first, whatever leaves these seeds below τ, until nothing does."""

    def needless(neuron: Neuron) -> bool:
        later = left[left.index(neuron) :]
        fewer = (_as_set([other for other in left if other != one]) for one in later)
        return probe.remaining(next(fewer), enough=_just_below(threshold), seeds=seeds, ahead=fewer) < threshold

    left = list(found)
    while (neuron := next(filter(needless, left), None)) is not None:
        left.remove(neuron)
    return left


def certify(
    neurons: NeuronSet, probe: Probe, threshold: float, *, on_trial: Callable[[], None] | None = None
) -> Certificate:
    """Measure a set of neurons: with all off, and with each one on again (docs/method.md, section 10).

    Args:
        neurons: the set; an empty one is minimal and, with a score of 1, not below τ.
        probe: tells the remaining memorization; one call for the set and one for each neuron.
        threshold: τ.
        on_trial: called after every neuron.
    """
    score = probe.remaining(neurons)
    each_on = []
    trials = [neurons - _as_set([pair]) for pair in neurons.pairs()]
    for number, (layer, index) in enumerate(neurons.pairs()):
        with_it_on = probe.remaining(trials[number], enough=_just_below(threshold), ahead=trials[number + 1 :])
        each_on.append(NeuronScore(layer, index, with_it_on))
        if on_trial is not None:
            on_trial()
    return Certificate(
        threshold=threshold,
        score=score,
        each_on=tuple(each_on),
        below_threshold=score <= threshold,
        minimal=all(row.score >= threshold for row in each_on),
    )


def _as_set(neurons: Iterable[Neuron]) -> NeuronSet:
    layers: dict[str, list[int]] = {}
    for layer, index in neurons:
        layers.setdefault(layer, []).append(index)
    return NeuronSet(layers)


def _just_below(threshold: float) -> float:
    """The `enough` for trials that have to stay below τ: what is above it is τ or more."""
    return math.nextafter(threshold, -math.inf)
