"""The paper's search: selection by θ and k, then layer by layer and neuron by neuron (docs/method.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.certificate import certify
from nemo_ext.search.outcome import Outcome, Refinement, Task, just_below
from nemo_ext.search.probe import Probe
from nemo_ext.search.selection import initial_selection


def search_exhaustive(task: Task) -> Outcome:
    """Select candidates, switch on again what is not needed, and certify the rest."""
    probe, protocol, bars = task.probe, task.protocol, task.bars
    activations = task.activations()
    notes = []
    floor, threshold = None, task.threshold
    if protocol.measures_floor:
        floor = probe.remaining(task.all_neurons)
        if floor > threshold:
            threshold = floor + protocol.raise_margin
            notes.append(task.floor_note(floor, threshold))
    with bars.task("initial selection") as advance:
        selection = initial_selection(
            activations, task.statistics, probe, threshold, protocol=protocol, on_trial=lambda: advance(1)
        )
    if selection.threshold != threshold:
        notes.append(
            f"the initial selection reached {selection.remaining:.3f} and not τ = {threshold:.3f}: "
            f"refined with τ = {selection.threshold:.3f}"
        )
    initial = selection.neurons
    with bars.task("refinement", len(initial.layers) + len(initial)) as advance:
        refinement = refine_exhaustive(selection.candidates, probe, selection.threshold, on_trial=lambda: advance(1))
    with bars.task("certificate", len(refinement.neurons)) as advance:
        certificate = certify(refinement.neurons, probe, selection.threshold, on_trial=lambda: advance(1))
    return Outcome(
        score_after=refinement.remaining,
        threshold_used=selection.threshold,
        neurons=refinement.neurons,
        certificate=certificate,
        floor=floor,
        notes=tuple(notes),
        theta=selection.theta,
        top_k=selection.top_k,
        initial_neurons=initial,
    )


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
            remaining = probe.remaining(NeuronSet(trial), stop_above=just_below(threshold), ahead=ahead)
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
