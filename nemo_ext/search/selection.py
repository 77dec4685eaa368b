"""The initial selection: neurons with an unusually high activation on a prompt (docs/method.md, section 8)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.outcome import Outcome, Refinement, Task
from nemo_ext.search.probe import Probe


@dataclass(frozen=True)
class Selection:
    """The candidates that the refinement starts from.

    Attributes:
        candidates: layer name -> neuron indices, in the order in which the refinement tries them. With
            `Protocol.keeps_duplicates` an index can occur twice.
        theta, top_k: the θ and k of the selection.
        remaining: the remaining memorization with all candidates off.
        threshold: τ for the refinement. It is the requested τ, or a raised one if that was not reached.
    """

    candidates: Mapping[str, tuple[int, ...]]
    theta: float
    top_k: int
    remaining: float
    threshold: float

    @property
    def neurons(self) -> NeuronSet:
        """The candidates as a set, without duplicates."""
        return NeuronSet(self.candidates)


def candidates(
    activation: Mapping[str, Tensor],
    z_scores: Mapping[str, Tensor],
    *,
    theta: float,
    top_k: int,
    keeps_duplicates: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Select the neurons of each layer with |a − μ| / σ > θ, and the k with the largest a (docs/method.md, section 8).

    Args:
        activation: layer name -> a, [N].
        z_scores: layer name -> |a − μ| / σ, [N].
        theta: θ.
        top_k: k. In a layer with fewer neurons all are selected.
        keeps_duplicates: if False, the indices are sorted and unique. If True, they are as in the published code: first
            the neurons above θ in ascending order, then the k with the largest a in descending order of a.

    Returns:
        Layer name -> neuron indices, with the layers in the order of `activation`. If activations are equal, the neuron
        with the lower index is selected first. Deterministic.
    """
    chosen = {}
    for layer, values in activation.items():
        above = (z_scores[layer] > theta).nonzero().flatten().tolist()
        largest = torch.sort(values, descending=True, stable=True).indices[:top_k].tolist()
        chosen[layer] = tuple(above + largest if keeps_duplicates else sorted({*above, *largest}))
    return chosen


def initial_selection(
    activation: Mapping[str, Tensor],
    statistics: ActivationStatistics,
    probe: Probe,
    threshold: float,
    *,
    protocol: Protocol,
    raise_threshold: Callable[[], float] | None = None,
    on_trial: Callable[[], None] | None = None,
    seeds: Collection[int] | None = None,
) -> Selection:
    """Lower θ and raise k until the remaining memorization is at most τ (docs/method.md, section 8).

    The selection starts with θ = `first_theta` and k = `first_top_k`. While the remaining memorization with all
    candidates off is above τ, θ is lowered by `theta_step`, but not below `last_theta`, and k is raised by 1. If θ
    reaches `last_theta`, or k reaches the width of the widest layer, τ is raised to the remaining memorization plus
    `raise_margin`.

    Args:
        activation: layer name -> the prompt's a, [N] float32, for the layers to search.
        statistics: μ and σ over ordinary prompts.
        probe: measures the remaining memorization.
        threshold: τ.
        protocol: the constants above, `tries_last_theta` and `keeps_duplicates` are read.
        raise_threshold: a function that is called once, after the first trial above τ, and returns the τ to continue
            with; None: τ stays.
        on_trial: a function that is called after every trial.
        seeds: the kept seeds that decide whether candidates are enough; None: all of them. The remaining memorization
            that becomes τ is always that of all kept seeds.

    Returns:
        The candidates, and the τ for their refinement.

    Raises:
        NemoError: `activation` has no layer, or a layer that the statistics do not have.

    Source: "Finding NeMo" (arXiv 2406.02366), section 3.
    """
    if not activation:
        raise NemoError("no layer to select neurons from")
    z_scores = statistics.z_scores(activation)
    widest = max(values.numel() for values in activation.values())
    theta, top_k = protocol.first_theta, protocol.first_top_k
    while True:
        chosen = candidates(activation, z_scores, theta=theta, top_k=top_k, keeps_duplicates=protocol.keeps_duplicates)
        next_theta, next_top_k = max(theta - protocol.theta_step, protocol.last_theta), top_k + 1
        # The published code checks the limits after the step, so it never tries the last θ.
        at_theta, at_top_k = (theta, top_k) if protocol.tries_last_theta else (next_theta, next_top_k)
        last = at_theta <= protocol.last_theta or at_top_k >= widest
        off = NeuronSet(chosen)
        # The last trial needs the exact remaining memorization, because it may become τ.
        remaining = probe.remaining(off) if last else probe.remaining(off, stop_above=threshold, seeds=seeds)
        if on_trial is not None:
            on_trial()
        if remaining <= threshold:
            return Selection(chosen, theta, top_k, remaining, threshold)
        if raise_threshold is not None:
            threshold, raise_threshold = raise_threshold(), None
            continue  # the same candidates may be below a raised τ
        if last:
            return Selection(chosen, theta, top_k, remaining, remaining + protocol.raise_margin)
        theta, top_k = next_theta, next_top_k


class Selected(NamedTuple):
    """The initial selection of a task.

    Attributes:
        selection: the candidates.
        floor: the remaining memorization with all searched neurons off; None if it was not measured.
        notes: why τ was raised, in sentences.
    """

    selection: Selection
    floor: float | None
    notes: tuple[str, ...]

    def outcome(self, refinement: Refinement) -> Outcome:
        """The outcome of a search that has refined this selection."""
        return Outcome(
            score_after=refinement.remaining,
            threshold_used=self.selection.threshold,
            neurons=refinement.neurons,
            floor=self.floor,
            notes=self.notes,
            theta=self.selection.theta,
            top_k=self.selection.top_k,
            initial_neurons=self.selection.neurons,
        )


def select_candidates(task: Task, *, floor_first: bool, seeds: Collection[int] | None = None) -> Selected:
    """The initial selection of a task, with τ raised if it cannot be reached (docs/method.md, sections 7 and 8).

    Args:
        task: the prompt to search.
        floor_first: whether the floor is measured before the first trial, or only if the first trial is above τ. The
            candidates are the same. It is not measured at all if the protocol says so.
        seeds: as for `initial_selection`.
    """
    probe, protocol = task.probe, task.protocol
    floor: float | None = None
    notes: list[str] = []

    def raised_by_floor() -> float:
        nonlocal floor
        floor = probe.remaining(task.all_neurons)
        if floor <= task.threshold:
            return task.threshold
        threshold = floor + protocol.raise_margin
        notes.append(task.floor_note(floor, threshold))
        return threshold

    threshold = raised_by_floor() if protocol.measures_floor and floor_first else task.threshold
    with task.bars.task("initial selection") as advance:
        selection = initial_selection(
            task.activations(),
            task.statistics,
            probe,
            threshold,
            protocol=protocol,
            raise_threshold=raised_by_floor if protocol.measures_floor and not floor_first else None,
            on_trial=lambda: advance(1),
            seeds=seeds,
        )
    reachable = threshold if floor is None or floor <= task.threshold else floor + protocol.raise_margin
    if selection.threshold != reachable:
        notes.append(
            f"with all candidates of the initial selection off the similarity is still {selection.remaining:.3f}, "
            f"above τ = {reachable:.3f}: refined with τ = {selection.threshold:.3f}"
        )
    return Selected(selection, floor, tuple(notes))
