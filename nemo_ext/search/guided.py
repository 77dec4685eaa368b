"""The guided search: a gradient ranks the neurons, then doubling and bisection (docs/method.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from nemo_ext.neurons import Neuron, NeuronSet
from nemo_ext.search.outcome import Outcome, Refinement, Task, just_below
from nemo_ext.search.probe import Probe

# An order is good if its first `_FRONT` neurons are enough. At most `_ORDERS` orders, of one seed each, are tried.
_FRONT = 8
_ORDERS = 3


def search_guided(task: Task) -> Outcome:
    """Rank all searched neurons by their effect, and find the ones that are needed.

    Args:
        task: the prompt to search. If the floor is above its τ, the search starts again with a raised τ and adds a note
            (docs/method.md, section 7).
    """
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
    return Outcome(
        score_after=refinement.remaining,
        threshold_used=threshold,
        neurons=refinement.neurons,
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
    """Find a 1-minimal set of neurons that is enough (docs/method.md, section 9).

    A set is enough if the remaining memorization with the set off is at most τ. It is 1-minimal if switching any one of
    its neurons on again gives τ or more.

    The search goes through the neurons in the order of their effect on a seed. The shortest prefix of the order that is
    enough is found by doubling and bisection, so its last neuron is needed. With that neuron off, the rest of the
    prefix is searched in the same way, until the found neurons are enough by themselves. This takes about k log n
    trials to find k of n neurons. Then found neurons that are no longer needed are switched on again.

    All these trials look at the likeliest seed alone. The set is then checked on all kept seeds. If one of them is
    still above τ, the search is repeated with that seed as well, in the order of the effects on it. If the first
    `_FRONT` neurons of an order are not enough, the effects on that seed may be uninformative, so the orders of up to
    two other seeds are tried.

    Args:
        ranked: a function that returns all neurons that may be switched off, as pairs (layer name, index), in the order
            of their effect on some seeds, the largest first.
        probe: measures the remaining memorization.
        threshold: τ.
        on_trial: a function that is called after every trial.

    Returns:
        The set, with the remaining memorization. If all neurons together are not enough, the result is all neurons,
        with a remaining memorization above τ.
    """
    # All trials look at the watched seeds. The neurons are ordered by their effect on the seed that joined last.
    newest = probe.likeliest()
    watched = list(newest)

    def enough(pairs: Sequence[Neuron]) -> bool:
        remaining = probe.remaining(NeuronSet.from_pairs(pairs), stop_above=threshold, seeds=watched)
        if on_trial is not None:
            on_trial()
        return remaining <= threshold

    while enough(order := ranked(newest)):
        tried = list(newest)
        while len(tried) < _ORDERS and not enough(order[:_FRONT]) and (others := probe.likeliest(besides=tried)):
            order = ranked(others)
            tried += others
        neurons = NeuronSet.from_pairs(_without_needless(_shortest(order, enough), probe, threshold, watched))
        remaining = probe.remaining(neurons, stop_above=threshold)
        if remaining <= threshold:
            return Refinement(neurons, remaining)
        newest = probe.hardest(neurons)
        watched += newest
    everything = NeuronSet.from_pairs(order)
    return Refinement(everything, probe.remaining(everything))


def _shortest(order: Sequence[Neuron], enough: Callable[[Sequence[Neuron]], bool]) -> list[Neuron]:
    """Find a set that is enough, if all of `order` is enough. Each neuron was needed at the time when it was found."""
    found: list[Neuron] = []
    while not (found and enough(found)):
        # Together with `found`, the first `few` neurons of the order are not enough, and the first `many` are.
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
    """Switch neurons on again while the similarity of these seeds stays below τ, the least effective neuron first."""
    left, place = tuple(found), 0
    while place < len(left):
        trials = _each_on(left, place)
        if probe.remaining(next(trials), stop_above=just_below(threshold), seeds=seeds, ahead=trials) < threshold:
            # A neuron that was needed before may not be needed now, so all neurons that are left are tried again.
            left, place = left[:place] + left[place + 1 :], 0
        else:
            place += 1
    return left


def _each_on(neurons: tuple[Neuron, ...], first: int) -> Iterator[NeuronSet]:
    """For each neuron from position `first` on, the set without that neuron."""
    for place in range(first, len(neurons)):
        yield NeuronSet.from_pairs(neurons[:place] + neurons[place + 1 :])
