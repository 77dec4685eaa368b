"""What the neuron sets of several prompts have in common: frequency, overlap, and clusters of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce

import networkx as nx
import numpy as np
import numpy.typing as npt

from nemo_ext.errors import NemoError
from nemo_ext.neurons import Neuron, NeuronSet


def intersection(sets: Sequence[NeuronSet]) -> NeuronSet:
    """Return the neurons that are in every set.

    Raises:
        NemoError: there are no sets.
    """
    if not sets:
        raise NemoError("an intersection needs one set of neurons or more, got none")
    return reduce(lambda one, other: one & other, sets)


def frequencies(sets: Sequence[NeuronSet]) -> dict[Neuron, int]:
    """Count in how many sets each neuron is.

    Returns:
        Neuron -> number of sets; the most frequent ones first, equally frequent ones in network order.
    """
    counts = Counter(neuron for one in sets for neuron in one.pairs())
    # `sorted` is stable, and the union is in network order.
    return {neuron: counts[neuron] for neuron in sorted(NeuronSet.union(sets).pairs(), key=lambda pair: -counts[pair])}


def most_frequent(sets: Sequence[NeuronSet], count: int) -> NeuronSet:
    """Return the `count` most frequent neurons, or all of them if there are fewer."""
    if count < 1:
        raise NemoError(f"the number of neurons must be 1 or more, got {count}")
    return NeuronSet.from_pairs(list(frequencies(sets))[:count])


def overlaps(sets: Sequence[NeuronSet]) -> npt.NDArray[np.float64]:
    """Return the overlap of every two sets, as the Jaccard index |A ∩ B| / |A ∪ B|.

    Returns:
        [P, P] for P sets, symmetric. It is 1 on the diagonal. The overlap with an empty set is 0.
    """
    columns = {neuron: place for place, neuron in enumerate(NeuronSet.union(sets).pairs())}
    members = np.zeros((len(sets), len(columns)))
    for row, one in enumerate(sets):
        members[row, [columns[neuron] for neuron in one.pairs()]] = 1
    both = members @ members.T
    sizes = both.diagonal()
    either = sizes[:, None] + sizes[None, :] - both
    overlap: npt.NDArray[np.float64] = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    np.fill_diagonal(overlap, 1)
    return overlap


def clusters(sets: Sequence[NeuronSet], at_least: float = 0.1) -> list[list[int]]:
    """Group the sets that share neurons: the connected components of the graph whose edges are large overlaps.

    Args:
        sets: the sets.
        at_least: the overlap (Jaccard index) from which two sets are connected, above 0 and at most 1.

    Returns:
        The positions of the sets of each cluster in ascending order, the largest cluster first. A set that is connected
        with no other is a cluster of its own.

    Raises:
        NemoError: `at_least` is out of range.
    """
    if not 0 < at_least <= 1:
        raise NemoError(f"at_least must be above 0 and at most 1, got {at_least:g}")
    graph = nx.Graph()
    graph.add_nodes_from(range(len(sets)))
    graph.add_edges_from(zip(*np.nonzero(np.triu(overlaps(sets) >= at_least, 1)), strict=True))
    return sorted((sorted(map(int, group)) for group in nx.connected_components(graph)), key=lambda g: (-len(g), g[0]))
