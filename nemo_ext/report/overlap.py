"""What the prompts' neurons have in common: how often neurons are shared, and how much the sets overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_ext.aggregate import frequencies, overlaps
from nemo_ext.report.heat_map import MAX_PROMPTS
from nemo_ext.report.plots import AFTER, Plot, as_plot, new_figure

if TYPE_CHECKING:
    from nemo_ext.results.record import Localization


def frequency_plot(localizations: Sequence[Localization]) -> Plot | None:
    """Draw how many neurons belong to one prompt, to two prompts, and so on.

    Args:
        localizations: all results, in the order of the report.

    Returns:
        The drawing; None if fewer than two prompts have neurons.
    """
    from matplotlib.ticker import MaxNLocator

    sets = [found.neurons for found in localizations if len(found.neurons)]
    if len(sets) < 2:
        return None
    counts = Counter(frequencies(sets).values())
    figure = new_figure(width=4.5, height=2.4)
    axes = figure.subplots()
    bars = axes.bar(list(counts), list(counts.values()), color=AFTER, width=0.8)
    axes.bar_label(bars, fontsize=9)
    axes.set_xlabel("prompts that share a neuron")
    axes.set_ylabel("neurons")
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return as_plot(figure)


def overlap_plot(localizations: Sequence[Localization]) -> Plot | None:
    """Draw the overlap of every two prompts' sets, as the Jaccard index. Of many prompts the first ones are shown.

    Args:
        localizations: all results, in the order of the report.

    Returns:
        The drawing; None if fewer than two prompts have neurons.
    """
    shown = [(number, found.neurons) for number, found in enumerate(localizations, start=1) if len(found.neurons)]
    shown = shown[:MAX_PROMPTS]
    if len(shown) < 2:
        return None
    side = 1.2 + 0.22 * len(shown)
    figure = new_figure(width=side + 1.2, height=max(2.4, side))
    axes = figure.subplots()
    image = axes.imshow(overlaps([neurons for _, neurons in shown]), cmap="viridis", vmin=0, vmax=1)
    names = [str(number) for number, _ in shown]
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("prompt")
    axes.set_ylabel("prompt")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="overlap", shrink=0.8)
    return as_plot(figure)
