"""The grouped search: the paper's decisions, taken for groups of candidates at once (docs/method.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.outcome import Outcome, Refinement, Step, Task, just_below, without
from nemo_ext.search.probe import Probe
from nemo_ext.search.selection import Selected, select_candidates


def search_grouped(task: Task) -> Outcome:
    """Select candidates as the exhaustive search does, and refine them in groups.

    Both look at watched seeds, as in `refine_grouped`. If another seed is above τ, it is watched as well, and both are
    repeated. So the candidates are measured on all kept seeds only if τ has to be raised.

    Args:
        task: the prompt to search. If the first candidates are not enough and the floor is above its τ, or the initial
            selection does not reach τ, the search continues with a raised τ and adds a note.
    """
    probe, bars = task.probe, task.bars
    selected: Selected

    def find(watched: Collection[int]) -> tuple[NeuronSet, float]:
        nonlocal selected
        selected = select_candidates(task, floor_first=False, seeds=watched)
        selection = selected.selection
        with bars.task("refinement") as advance:
            needed = _needed(selection.candidates, probe, selection.threshold, watched, lambda: advance(1))
        return needed, selection.threshold

    refinement = _accepted_by_all_seeds(find, probe)
    return selected.outcome(refinement)


def refine_grouped(
    candidates: Mapping[str, Sequence[int]],
    probe: Probe,
    threshold: float,
    *,
    on_trial: Callable[[], None] | None = None,
) -> Refinement:
    """`refine_exhaustive` with several candidates switched on in one trial (docs/method.md, section 9).

    The candidates are tried in the order of `refine_exhaustive`: layers, the deepest first, then the neurons of the
    layers that are left. A group of them is switched on together. If the remaining memorization stays below τ, none of
    the group is needed. Otherwise, bisection finds the first one that is. If switching more neurons on never lowers the
    remaining memorization, all decisions are those of `refine_exhaustive`.

    Trials look at a watched seed, at first the likeliest one. The set that is found is then checked on all kept seeds.
    If one of them is above τ, it is watched as well, and the refinement is repeated; trials that have run before cost
    nothing.

    Args:
        candidates: layer name -> neuron indices, with the layers in network order, as for `refine_exhaustive`. With all
            of them off, the remaining memorization must be at most τ.
        probe: measures the remaining memorization.
        threshold: τ. A group stays on only if the remaining memorization is below τ; equality is not enough.
        on_trial: a function that is called after every trial.

    Returns:
        The candidates that stay off, with the remaining memorization over all kept seeds.
    """
    return _accepted_by_all_seeds(
        lambda watched: (_needed(candidates, probe, threshold, watched, on_trial), threshold), probe
    )


def _accepted_by_all_seeds(find: Callable[[Collection[int]], tuple[NeuronSet, float]], probe: Probe) -> Refinement:
    """Find a set that is enough for watched seeds, and watch more of them until it is enough for all kept seeds.

    Args:
        find: finds a set that is enough for some seeds, and returns it with its τ.
        probe: measures the remaining memorization.
    """
    watched = list(probe.likeliest())
    while True:
        neurons, threshold = find(watched)
        # Where one seed objects, others often do, so one is asked before all of them.
        other = probe.likeliest(besides=watched)
        if other and probe.remaining(neurons, stop_above=threshold, seeds=other) > threshold:
            watched += other
            continue
        remaining = probe.remaining(neurons, stop_above=threshold)
        objecting = [seed for seed in probe.hardest(neurons) if seed not in watched]
        if remaining <= threshold or not objecting:
            return Refinement(neurons, probe.remaining(neurons))
        watched += objecting


def _needed(
    candidates: Mapping[str, Sequence[int]],
    probe: Probe,
    threshold: float,
    seeds: Collection[int],
    on_trial: Callable[[], None] | None,
) -> NeuronSet:
    """The candidates that some seeds need."""

    def passes(off: Mapping[str, Sequence[int]]) -> bool:
        remaining = probe.remaining(NeuronSet(off), stop_above=just_below(threshold), seeds=seeds)
        if on_trial is not None:
            on_trial()
        return remaining < threshold

    off = {layer: list(indices) for layer, indices in candidates.items() if indices}
    off = _switch_on(off, [(layer, off[layer]) for layer in reversed(off)], passes)
    off = _switch_on(off, [(layer, [index]) for layer in reversed(off) for index in off[layer]], passes)
    return NeuronSet(off)


def _switch_on(
    off: dict[str, list[int]], steps: Sequence[Step], passes: Callable[[Mapping[str, Sequence[int]]], bool]
) -> dict[str, list[int]]:
    """Take steps in order, as far as the neurons that stay off pass, and return these neurons.

    The size of a group is the average distance between needed steps so far, and it doubles as long as groups pass. So
    if every step is needed, each of them takes one trial. If few are, each of them takes about two logarithms of the
    distance.
    """
    place, size, taken, needed = 0, (len(steps) + 1) // 2, 0, 0
    while place < len(steps):
        group = steps[place : place + size]
        if passes(without(off, group)):
            off = without(off, group)
            place, taken, size = place + len(group), taken + len(group), 2 * size
            continue
        few, many = 0, len(group)  # the first `few` steps of the group pass, its first `many` do not
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if passes(without(off, group[:middle])) else (few, middle)
        off = without(off, group[:few])
        place, taken, needed = place + many, taken + few, needed + 1
        size = max(1, taken // needed)
    return off
