"""Initial selection: the neurons that a prompt drives unusually hard (docs/method.md, section 8)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.probe import Probe


@dataclass(frozen=True)
class Selection:
    """The candidates that refinement starts from.

    Attributes:
        candidates: layer name -> neuron indices in the order in which refinement visits them; with
            `Protocol.keeps_duplicates` an index can stand twice.
        theta, top_k: the θ and k that they were selected with.
        remaining: remaining memorization with all of them off.
        threshold: τ for the refinement: the one asked for, or a raised one if that wasn't reached.
    """

    candidates: Mapping[str, tuple[int, ...]]
    theta: float
    top_k: int
    remaining: float
    threshold: float

    @property
    def neurons(self) -> NeuronSet:
        """The candidates as a set."""
        return NeuronSet(self.candidates)


def candidates(
    activation: Mapping[str, Tensor],
    z_scores: Mapping[str, Tensor],
    *,
    theta: float,
    top_k: int,
    keeps_duplicates: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Neurons of each layer with |a − μ| / σ > θ, and the k with the largest a.

    Args:
        activation: layer name -> a, [N].
        z_scores: layer name -> |a − μ| / σ, [N].
        theta: θ.
        top_k: k; a layer with fewer neurons gives all.
        keeps_duplicates: False: indices are sorted and unique. True: those above θ in ascending
            order, then the k largest in descending order of a, as in the published code.

    Returns:
        Layer name -> indices, layers in the order of `activation`. Of equal activations the lower
        index counts as larger.
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
    on_trial: Callable[[], None] | None = None,
) -> Selection:
    """Lower θ and raise k until switching the candidates off leaves at most τ (docs/method.md, section 8).

    Starts at `first_theta` and `first_top_k`. While the remaining memorization is above τ: θ is
    lowered by `theta_step`, not below `last_theta`, and k raised by 1. If θ reaches `last_theta` or
    k the widest layer first, τ is raised to what was reached, plus `raise_margin`.

    Args:
        activation: layer name -> the prompt's a, [N] float32, for the layers to search.
        statistics: μ and σ over ordinary prompts.
        probe: tells the remaining memorization.
        threshold: τ.
        protocol: the numbers above, `tries_last_theta` and `keeps_duplicates`.
        on_trial: called after every trial.

    Raises:
        NemoError: a layer that the statistics don't have, or no layer.
    """
    if not activation:
        raise NemoError("no layer to select neurons from")
    z_scores = statistics.z_scores(activation)
    widest = max(values.numel() for values in activation.values())
    theta, top_k = protocol.first_theta, protocol.first_top_k
    while True:
        chosen = candidates(activation, z_scores, theta=theta, top_k=top_k, keeps_duplicates=protocol.keeps_duplicates)
        next_theta, next_top_k = max(theta - protocol.theta_step, protocol.last_theta), top_k + 1
        # The published code looks at the next step, and so it never tries the last one.
        at_theta, at_top_k = (theta, top_k) if protocol.tries_last_theta else (next_theta, next_top_k)
        last = at_theta <= protocol.last_theta or at_top_k >= widest
        # The last step needs the exact number, because it may become the threshold.
        remaining = probe.remaining(NeuronSet(chosen), stop_above=None if last else threshold)
        if on_trial is not None:
            on_trial()
        if remaining <= threshold:
            return Selection(chosen, theta, top_k, remaining, threshold)
        if last:
            return Selection(chosen, theta, top_k, remaining, remaining + protocol.raise_margin)
        theta, top_k = next_theta, next_top_k
