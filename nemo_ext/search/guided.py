"""The guided search: neurons ranked by a gradient, then doubling and bisection (docs/method.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from nemo_ext.neurons import Neuron, NeuronSet
from nemo_ext.search.certificate import certify
from nemo_ext.search.outcome import Outcome, Refinement, Task, just_below
from nemo_ext.search.probe import Probe

# If the first few neurons of an order are enough, the order is good; and how many orders are tried at most.
_FRONT = 8
_ORDERS = 3


def search_guided(task: Task) -> Outcome:
    """Rank all searched neurons by their effect, find those that are needed, and certify them."""
    probe, bars = task.probe, task.bars
    pairs = [(layer, index) for layer, width in task.widths.items() for index in range(width)]

    def ranked(seeds: Collection[int]) -> list[Neuron]:
        effects = probe.effects(list(task.widths), seeds)
        ranks = torch.cat([effects[layer] for layer in task.widths]).sort(descending=True, stable=True).indices
        return [pairs[rank] for rank in ranks.tolist()]

    floor, threshold, notes = None, task.threshold, []
    with bars.task("guided search") as advance:
        refinement = refine_guided(ranked, probe, threshold, on_trial=lambda: advance(1))
        if refinement.remaining > threshold:
            floor = refinement.remaining
            threshold = floor + task.protocol.raise_margin
            notes.append(task.floor_note(floor, threshold))
            refinement = refine_guided(ranked, probe, threshold, on_trial=lambda: advance(1))
    with bars.task("certificate", len(refinement.neurons)) as advance:
        certificate = certify(refinement.neurons, probe, threshold, on_trial=lambda: advance(1))
    return Outcome(
        score_after=refinement.remaining,
        threshold_used=threshold,
        neurons=refinement.neurons,
        certificate=certificate,
        floor=floor,
        notes=tuple(notes),
    )


def refine_guided(
    ranked: Callable[[Collection[int]], Sequence[Neuron]],
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
        remaining = probe.remaining(NeuronSet.from_pairs(pairs), stop_above=threshold, seeds=seeds)
        if on_trial is not None:
            on_trial()
        return remaining <= threshold

    while enough(order := ranked(hardest)):
        asked = list(hardest)
        while len(asked) < _ORDERS and not enough(order[:_FRONT]) and (others := probe.likeliest(besides=asked)):
            order = ranked(others)
            asked += others
        neurons = NeuronSet.from_pairs(_without_needless(_shortest(order, enough), probe, threshold, seeds))
        remaining = probe.remaining(neurons, stop_above=threshold)
        if remaining <= threshold:
            return Refinement(neurons, remaining)
        hardest = probe.hardest(neurons)
        seeds += hardest
    everything = NeuronSet.from_pairs(order)
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


def _without_needless(
    found: Sequence[Neuron], probe: Probe, threshold: float, seeds: Collection[int]
) -> tuple[Neuron, ...]:
    """Switch on again, the least effective first, whatever leaves these seeds below τ, until nothing does."""
    left, place = tuple(found), 0
    while place < len(left):
        trials = _each_on(left, place)
        if probe.remaining(next(trials), stop_above=just_below(threshold), seeds=seeds, ahead=trials) < threshold:
            # What was needed before can be needless now, so all that are left are tried again.
            left, place = left[:place] + left[place + 1 :], 0
        else:
            place += 1
    return left


def _each_on(neurons: tuple[Neuron, ...], first: int) -> Iterator[NeuronSet]:
    """The set without one of its neurons, for each neuron from the `first` on."""
    for place in range(first, len(neurons)):
        yield NeuronSet.from_pairs(neurons[:place] + neurons[place + 1 :])
