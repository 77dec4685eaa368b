"""The control of an evaluation: as many random neurons as were found, in the same layers."""

from __future__ import annotations

import random
from collections.abc import Mapping

from nemo_ext.neurons import NeuronSet


def random_neurons(found: NeuronSet, widths: Mapping[str, int], *, seed: str) -> NeuronSet:
    """Draw as many neurons in each layer as `found` has there, among the layer's other neurons.

    If a layer has fewer other neurons, all of them are taken.

    Args:
        found: the neurons that the control stands beside.
        widths: layer name -> number of neurons, for every layer of `found`.
        seed: equal seeds give equal neurons, on every machine.
    """
    rng = random.Random(seed)
    drawn = {}
    for layer, indices in found.items():
        others = sorted(set(range(widths[layer])) - set(indices))
        drawn[layer] = rng.sample(others, min(len(indices), len(others)))
    return NeuronSet(drawn)
