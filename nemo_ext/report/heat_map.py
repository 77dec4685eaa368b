"""Which neurons of which layers the prompts' sets have: a map of prompts and neurons, and counts for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemo_ext.models.registry import short_layer_name
from nemo_ext.neurons import Neuron, NeuronSet
from nemo_ext.report.plots import AFTER, INK, Plot, as_plot, new_figure

if TYPE_CHECKING:
    from nemo_ext.results.record import Localization

#: The largest map. More rows or columns would be too small to tell apart.
MAX_PROMPTS, MAX_NEURONS = 48, 96
#: With more columns than this, there is no room for the index of each neuron.
_MAX_NAMED_NEURONS = 40
#: The empty columns between two layers.
_GAP = 1


@dataclass(frozen=True)
class NeuronMap:
    """A map of prompts (rows) and neurons (columns).

    Attributes:
        plot: the map.
        prompts, neurons: how many of each it shows.
        all_prompts, all_neurons: how many there are.
        shared: how many of all neurons belong to more than one prompt.
    """

    plot: Plot
    prompts: int
    neurons: int
    all_prompts: int
    all_neurons: int
    shared: int


@dataclass(frozen=True)
class LayerCount:
    """The neurons that were found in one layer.

    Attributes:
        layer: the name of the layer.
        neurons: the number of different neurons, for all prompts together.
        prompts: the number of prompts whose set has a neuron in this layer.
    """

    layer: str
    neurons: int
    prompts: int


def layer_counts(localizations: Sequence[Localization]) -> list[LayerCount]:
    """Count the different neurons, and the prompts, of each layer that has a neuron, in network order."""
    union = NeuronSet.union(found.neurons for found in localizations)
    return [
        LayerCount(layer, len(indices), sum(layer in found.neurons for found in localizations))
        for layer, indices in union.items()
    ]


def neuron_map(localizations: Sequence[Localization]) -> NeuronMap | None:
    """Draw which neurons each prompt's set has: a row for each prompt, and a column for each different neuron.

    Columns are grouped by layer, in network order. Of many prompts the first ones are shown, and of many neurons those
    that most prompts share.

    Args:
        localizations: all results, in the order of the report.

    Returns:
        The map; None if fewer than two prompts have neurons, because a map of one row compares nothing.
    """
    rows = [(number, found.neurons) for number, found in enumerate(localizations, start=1) if len(found.neurons)]
    if len(rows) < 2:
        return None
    uses = Counter(neuron for _, neurons in rows for neuron in neurons.pairs())
    union = NeuronSet.union(neurons for _, neurons in rows).pairs()
    # `sorted` is stable, so equally frequent neurons stay in network order.
    columns = NeuronSet.from_pairs(sorted(union, key=lambda neuron: -uses[neuron])[:MAX_NEURONS])
    shown = rows[:MAX_PROMPTS]
    return NeuronMap(
        plot=_draw(shown, columns),
        prompts=len(shown),
        neurons=len(columns),
        all_prompts=len(rows),
        all_neurons=len(union),
        shared=sum(count > 1 for count in uses.values()),
    )


def _draw(rows: Sequence[tuple[int, NeuronSet]], columns: NeuronSet) -> Plot:
    from matplotlib.colors import to_rgb

    places: dict[Neuron, int] = {}
    edges: list[tuple[str, int, int]] = []  # short name, first and last column of a layer
    place = 0
    for layer, indices in columns.items():
        edges.append((short_layer_name(layer), place, place + len(indices) - 1))
        for index in indices:
            places[layer, index] = place
            place += 1
        place += _GAP
    width = place - _GAP
    # One picture instead of one rectangle for each cell, which would make the page large. Empty cells of every second
    # row are tinted, so that the eye finds the way from a cell to its prompt.
    cells = np.zeros((len(rows), width, 4))
    cells[::2, list(places.values())] = (0.5, 0.5, 0.5, 0.18)
    for row, (_, neurons) in enumerate(rows):
        cells[row, [places[neuron] for neuron in neurons.pairs() if neuron in places]] = (*to_rgb(AFTER), 1)
    named = len(columns) <= _MAX_NAMED_NEURONS
    figure = new_figure(width=max(3.0, 1.2 + 0.21 * width), height=1.6 + (0.3 if named else 0) + 0.2 * len(rows))
    axes = figure.subplots()
    axes.imshow(cells, interpolation="none", aspect="auto")
    axes.set_yticks(range(len(rows)), [str(number) for number, _ in rows], fontsize=9)
    axes.set_ylabel("prompt")
    if named:
        names = [str(index) for _, index in places]
        axes.set_xticks(list(places.values()), names, rotation=90, fontsize=8)
        axes.set_xlabel("neuron")
    else:
        axes.set_xticks([])
    axes.tick_params(length=0)
    # No layer's name can stand above its neurons without meeting its neighbours, so all are written at a slant.
    for name, first, last in edges:
        axes.plot([first - 0.4, last + 0.4], [-0.75, -0.75], color=INK, linewidth=2, clip_on=False)
        axes.text((first + last) / 2, -1.0, name, rotation=40, rotation_mode="anchor", fontsize=9, color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return as_plot(figure)
