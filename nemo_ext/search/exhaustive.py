"""The exhaustive search, which is the paper's: initial selection and refinement (docs/method.md, sections 8 and 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.certificate import certify
from nemo_ext.search.outcome import Outcome, Refinement, Task, just_below
from nemo_ext.search.probe import Probe
from nemo_ext.search.selection import initial_selection


def search_exhaustive(task: Task) -> Outcome:
    """Select candidates, switch the ones that are not needed on again, and certify the others.

    Args:
        task: the prompt to search. If the floor is above its τ, or the initial selection does not reach τ, the search
            continues with a raised τ and adds a note (docs/method.md, sections 7 and 8).
    """
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
            f"with all candidates of the initial selection off the similarity is still {selection.remaining:.3f}, "
            f"above τ = {threshold:.3f}: refined with τ = {selection.threshold:.3f}"
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
    """Switch candidates on again, layer by layer and then one by one, as far as τ allows (docs/method.md, section 9).

    For each layer, the deepest first, a trial switches all its candidates on. If the remaining memorization is then
    below τ, they are not needed and stay on. In the other layers, the deepest first, the same is tried for each
    candidate, in the order of `candidates`. So there is at most one trial per layer and one per candidate. The faster
    searches are compared with this one. It is deterministic if the probe is.

    Args:
        candidates: layer name -> neuron indices, with the layers in network order, as in a `NeuronSet`. If an index
            occurs twice, the neuron is on only after both occurrences have been switched on.
        probe: measures the remaining memorization.
        threshold: τ. Candidates stay on only if the remaining memorization is below τ; equality is not enough.
        on_trial: a function that is called after every trial.

    Returns:
        The neurons that stay off, with the remaining memorization.

    Source: "Finding NeMo" (arXiv 2406.02366), section 3.
    """
    off = {layer: list(indices) for layer, indices in candidates.items() if indices}

    def switch_on(steps: Sequence[tuple[str, Sequence[int]]]) -> None:
        nonlocal off
        for number, step in enumerate(steps):
            trial = _without(off, step)
            # Most candidates are not needed, so this trial will probably succeed, and the next one will start from it.
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
    """A copy of `off` without some neurons of a layer; each index in `step` removes one occurrence."""
    left = {layer: list(indices) for layer, indices in off.items()}
    layer, switched_on = step
    for index in switched_on:
        left[layer].remove(index)
    return left
