"""The exhaustive search, which is the paper's: initial selection and refinement (docs/method.md, sections 8 and 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.outcome import Outcome, Refinement, Step, Task, just_below, without
from nemo_ext.search.probe import Probe
from nemo_ext.search.selection import select_candidates


def search_exhaustive(task: Task) -> Outcome:
    """Select candidates, and switch the ones that are not needed on again.

    Args:
        task: the prompt to search. If the floor is above its τ, or the initial selection does not reach τ, the search
            continues with a raised τ and adds a note (docs/method.md, sections 7 and 8).
    """
    probe, bars = task.probe, task.bars
    selected = select_candidates(task, floor_first=True)
    selection, initial = selected.selection, selected.selection.neurons
    with bars.task("refinement", len(initial.layers) + len(initial)) as advance:
        refinement = refine_exhaustive(selection.candidates, probe, selection.threshold, on_trial=lambda: advance(1))
    return selected.outcome(refinement)


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

    def switch_on(steps: Sequence[Step]) -> None:
        nonlocal off
        for number, step in enumerate(steps):
            trial = without(off, [step])
            # Most candidates are not needed, so this trial will probably succeed, and the next one will start from it.
            ahead = [NeuronSet(without(trial, [next_step])) for next_step in steps[number + 1 : number + 2]]
            remaining = probe.remaining(NeuronSet(trial), stop_above=just_below(threshold), ahead=ahead)
            if on_trial is not None:
                on_trial()
            if remaining < threshold:
                off = trial

    switch_on([(layer, off[layer]) for layer in reversed(off)])
    switch_on([(layer, [index]) for layer in reversed(off) for index in off[layer]])
    neurons = NeuronSet(off)
    return Refinement(neurons, probe.remaining(neurons))
