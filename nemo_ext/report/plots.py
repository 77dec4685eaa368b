"""The plots of the report, as SVG in data URIs.

Each function returns a plot twice: "light" and "dark" -> data URI, for a page with a light and a dark background.
Plots contain no prompts, because matplotlib would interpret some of their characters as markup.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_ext.models.registry import short_layer_name
from nemo_ext.neurons import NeuronSet
from nemo_ext.report.images import as_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemo_ext.results.record import Localization

#: With more bars than this, their names would be too small to read.
MAX_NAMED_BARS = 32

_BEFORE, _AFTER, _THRESHOLD = "#c8553d", "#2a7f9e", "#8a8a8a"
#: A placeholder for the text colour, which is replaced by the colour of the light and of the dark page.
_INK = "#0f0e0d"
_INKS = {"light": "#222222", "dark": "#e4e4e4"}


def score_plot(localizations: Sequence[Localization]) -> dict[str, str]:
    """Plot the score of each prompt before and after its neurons are switched off, with the thresholds."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(width=max(4.5, min(11.0, 1.6 + 0.42 * len(localizations))), height=3.2)
    axes = figure.subplots()
    places = range(1, len(localizations) + 1)
    searched = [
        (place, found.score_before, found.score_after)
        for place, found in zip(places, localizations, strict=True)
        if found.score_after is not None
    ]
    axes.vlines(
        [place for place, _, _ in searched],
        [after for _, _, after in searched],
        [before for _, before, _ in searched],
        color=_THRESHOLD,
        linewidth=1,
    )
    axes.plot(places, [f.score_before for f in localizations], "o", color=_BEFORE, label="before")
    axes.plot(
        [place for place, _, _ in searched],
        [after for _, _, after in searched],
        "s",
        color=_AFTER,
        label="after",
    )
    thresholds = sorted({found.threshold for found in localizations})
    for threshold in thresholds:
        axes.axhline(threshold, color=_INK, linestyle="--", linewidth=1)
    axes.plot([], [], color=_INK, linestyle="--", linewidth=1, label="threshold τ")
    axes.set_xlabel("prompt")
    axes.set_ylabel("score (similarity)")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.4, len(localizations) + 0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.18), ncols=3, frameon=False)
    return _svg_uris(figure)


def layer_plot(localizations: Sequence[Localization]) -> dict[str, str]:
    """Plot the number of different neurons that were found in each value layer."""
    from matplotlib.ticker import MaxNLocator

    union = NeuronSet.union(found.neurons for found in localizations)
    figure = _figure(width=max(4.5, 1.2 + 0.75 * len(union.layers)), height=3.0)
    axes = figure.subplots()
    bars = axes.bar(
        [short_layer_name(layer) for layer in union],
        [len(indices) for indices in union.values()],
        color=_AFTER,
    )
    axes.bar_label(bars, color=_INK)
    axes.set_ylabel("neurons")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", rotation=30 if len(union.layers) > 6 else 0)
    return _svg_uris(figure)


def certificate_plot(found: Localization) -> dict[str, str]:
    """Plot the remaining memorization with each neuron of one result on again; the result must have a certificate."""
    assert found.certificate is not None
    rows = sorted(found.certificate.each_on, key=lambda row: -row.score)
    named = len(rows) <= MAX_NAMED_BARS
    figure = _figure(width=max(4.5, min(11.0, 1.6 + 0.34 * len(rows))), height=3.0)
    axes = figure.subplots()
    axes.bar(range(len(rows)), [row.score for row in rows], color=_BEFORE, width=0.8)
    axes.axhline(found.certificate.threshold, color=_INK, linestyle="--", linewidth=1)
    axes.text(
        1.01,
        found.certificate.threshold,
        "τ",
        transform=axes.get_yaxis_transform(),
        va="center",
        color=_INK,
    )
    axes.set_ylim(0, 1.05)
    axes.set_xlim(-0.8, len(rows) - 0.2)
    axes.set_ylabel("score, neuron on again")
    if named:
        names = [f"{short_layer_name(row.layer)} #{row.index}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=7)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(rows)} neurons, highest score first")
    return _svg_uris(figure)


def _figure(*, width: float, height: float) -> Figure:
    # pyplot is not used, because it would choose a display and hold a reference to every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg_uris(figure: Figure) -> dict[str, str]:
    """Encode a figure as data URIs: "light" and "dark" -> URI."""
    import matplotlib

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set_color(_INK)
    buffer = io.BytesIO()
    # Text is written as text, and the file has no date and no random ids, so that equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_ext"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode("utf-8")
    return {page: as_uri("image/svg+xml", svg.replace(_INK, ink).encode("utf-8")) for page, ink in _INKS.items()}
