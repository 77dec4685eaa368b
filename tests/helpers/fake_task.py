"""A task without a model, for the searches: a probe, and activations that are their own z-scores."""

import torch
from torch import Tensor

from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.progress import Progress
from nemo_ext.search.outcome import Task
from nemo_ext.search.probe import Probe


class UnitStatistics(ActivationStatistics):
    """μ = 0 and σ = 1, so that a prompt's activations are its z-scores."""

    def z_scores(self, activation: dict[str, Tensor]) -> dict[str, Tensor]:
        return {layer: values.double() for layer, values in activation.items()}


STATISTICS = UnitStatistics({})


def fake_task(
    probe: Probe, activation: dict[str, list[float]], threshold: float, protocol: Protocol | None = None
) -> Task:
    activations = {layer: torch.tensor(values) for layer, values in activation.items()}
    widths = {layer: len(values) for layer, values in activation.items()}
    bars = Progress(enabled=False)
    return Task(probe, lambda: activations, STATISTICS, widths, threshold, protocol or Protocol.paper(), bars)
