"""The interface of the searches: each of them is a function that takes a `Task` and returns an `Outcome`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.neurons import NeuronSet
from nemo_ext.progress import Progress
from nemo_ext.search.probe import NoiseProbe

#: Neurons that a refinement switches on together: a layer, and indices of neurons in it.
Step = tuple[str, Sequence[int]]


@dataclass(frozen=True)
class Task:
    """One memorized prompt to search.

    Attributes:
        probe: the prompt's probe, which compares the kept seeds.
        activations: computes the prompt's activations: layer name -> a, [N] float32, for the searched layers.
        statistics: μ and σ over ordinary prompts.
        widths: layer name -> N of the searched layers, in network order.
        threshold: τ.
        protocol: how to search.
        bars: the progress bars.
    """

    probe: NoiseProbe
    activations: Callable[[], Mapping[str, Tensor]]
    statistics: ActivationStatistics
    widths: Mapping[str, int]
    threshold: float
    protocol: Protocol
    bars: Progress

    @property
    def all_neurons(self) -> NeuronSet:
        """All neurons of the searched layers."""
        return NeuronSet({layer: range(width) for layer, width in self.widths.items()})

    def floor_note(self, floor: float, threshold: float) -> str:
        """The note that explains why τ was raised to `threshold`: the floor is above the requested τ."""
        return (
            f"with all {len(self.all_neurons)} searched neurons off the similarity is still {floor:.3f}, "
            f"above τ = {self.threshold:.3f}: searched with τ = {threshold:.3f}"
        )


@dataclass(frozen=True)
class Refinement:
    """The result of a refinement.

    Attributes:
        neurons: the candidates that stay off.
        remaining: the remaining memorization with these neurons off.
    """

    neurons: NeuronSet
    remaining: float


@dataclass(frozen=True)
class Outcome:
    """The result of a search, before it is certified. `Localization` has the same fields and describes them."""

    score_after: float | None = None
    threshold_used: float | None = None
    neurons: NeuronSet = field(default_factory=NeuronSet)
    floor: float | None = None
    notes: tuple[str, ...] = ()
    theta: float | None = None
    top_k: int | None = None
    initial_neurons: NeuronSet = field(default_factory=NeuronSet)


def just_below(threshold: float) -> float:
    """The largest float below τ. With it as `stop_above`, a trial may stop early only if its result is τ or more."""
    return math.nextafter(threshold, -math.inf)


def without(off: Mapping[str, Sequence[int]], steps: Sequence[Step]) -> dict[str, list[int]]:
    """A copy of `off` without the neurons of some steps; each index in a step removes one occurrence."""
    left = {layer: list(indices) for layer, indices in off.items()}
    for layer, switched_on in steps:
        for index in switched_on:
            left[layer].remove(index)
    return left
