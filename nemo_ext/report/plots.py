"""The plots of the report, as SVG in data URIs.

Plots contain no prompts, because matplotlib would interpret some of their characters as markup.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_ext.models.registry import short_layer_name
from nemo_ext.report.images import as_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemo_ext.results.record import Localization

#: With more bars than this, their names would be too small to read.
MAX_NAMED_BARS = 32
#: With more points than this, they are drawn as one picture, because a drawing of each would make the page large.
MAX_DRAWN_POINTS = 300

BEFORE, AFTER, GRAY = "#c8553d", "#2a7f9e", "#8a8a8a"
#: A placeholder for the text colour, which is replaced by the colour of the light and of the dark page.
INK = "#0f0e0d"
_INKS = {"light": "#222222", "dark": "#e4e4e4"}

#: The widest plot, in inches. The page is as wide.
MAX_WIDTH = 9.8
#: SVG has 72 points per inch in matplotlib, and a browser 96 pixels.
_PIXELS = 96


@dataclass(frozen=True)
class Plot:
    """A drawing for pages with a light and a dark background, which differ in the colour of the text.

    Attributes:
        light, dark: the drawing as a data URI.
        width, height: its natural size on the page, in pixels.
    """

    light: str
    dark: str
    width: int
    height: int


@dataclass(frozen=True)
class _Pair:
    """A figure of one prompt before and after; None if it is not known. `failed`: the figure after is too high."""

    before: float | None
    after: float | None
    failed: bool


def score_plot(localizations: Sequence[Localization]) -> Plot:
    """Plot the score of each prompt before and after its neurons are switched off, with the thresholds.

    If images of any prompt were compared, a second panel shows their highest similarity in the same way.
    """
    from matplotlib.ticker import MaxNLocator

    scores = [_Pair(f.score_before, f.score_after, not f.below_threshold) for f in localizations]
    panels = [("score (similarity)", "τ", scores, {found.threshold for found in localizations})]
    verdicts = [found.verdict for found in localizations if found.verdict]
    if verdicts:
        images = [_image_similarity(found) for found in localizations]
        panels.append(("image similarity", "τ_image", images, {verdict.threshold for verdict in verdicts}))
    figure = new_figure(width=4.5 + 0.3 * max(0, len(localizations) - 6), height=0.7 + 2.4 * len(panels))
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, name, pairs, thresholds) in zip(all_axes, panels, strict=True):
        _before_and_after(axes, pairs)
        axes.set_ylabel(label)
        for threshold in sorted(thresholds):
            axes.axhline(threshold, color=INK, linestyle="--", linewidth=1)
            _name_line(axes, threshold, name)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    all_axes[-1].set_xlabel("prompt")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[-1].set_xlim(0.4, len(localizations) + 0.6)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return as_plot(figure)


def _image_similarity(found: Localization) -> _Pair:
    verdict = found.verdict
    if verdict is None:
        return _Pair(None, None, False)
    return _Pair(max(verdict.before), verdict.final.highest if found.memorized else None, not verdict.silenced)


def _before_and_after(axes: Any, pairs: Sequence[_Pair]) -> None:
    """Draw a line from before to after for each prompt; an after that is too high has a mark of its own."""
    before = [(place, pair.before) for place, pair in enumerate(pairs, start=1) if pair.before is not None]
    both = [
        (place, pair.before, pair.after, pair.failed)
        for place, pair in enumerate(pairs, start=1)
        if pair.before is not None and pair.after is not None
    ]
    axes.vlines([row[0] for row in both], [row[2] for row in both], [row[1] for row in both], color=GRAY, linewidth=1)
    axes.plot([place for place, _ in before], [value for _, value in before], "o", color=BEFORE, label="before")
    for label, marker, colour, wanted in (("after", "s", AFTER, False), ("after, too high", "X", BEFORE, True)):
        chosen = [(place, after) for place, _, after, failed in both if failed == wanted]
        axes.plot([place for place, _ in chosen], [after for _, after in chosen], marker, color=colour, label=label)


def search_plot(found: Localization) -> Plot:
    """Plot the remaining memorization over the trials of one prompt's search; the result must have a history.

    The colour of a point is the number of neurons that were off. The dashed line is τ, and a dotted line is the τ that
    the search used, if that is another one.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    values = [value for _, value in found.history]
    # A search begins with hundreds of neurons and ends with a few, which would all have the same colour.
    counts = [max(1, count) for count, _ in found.history]
    lowest, highest = min(counts), max(counts)
    figure = new_figure(width=5.0 + 0.04 * max(0, len(values) - 40), height=2.9)
    axes = figure.subplots()
    # The edge has enough contrast on light and on dark pages, whatever the colour inside it.
    points = axes.scatter(
        range(1, len(values) + 1),
        values,
        c=counts,
        cmap="viridis",
        norm=LogNorm(lowest, max(highest, lowest + 1)),
        s=30 if len(values) <= MAX_DRAWN_POINTS else 12,
        edgecolors=GRAY,
        linewidths=0.8,
        zorder=3,
        rasterized=len(values) > MAX_DRAWN_POINTS,
    )
    axes.axhline(found.threshold, color=INK, linestyle="--", linewidth=1)
    _name_line(axes, found.threshold, "τ")
    if found.threshold_used is not None and found.threshold_used != found.threshold:
        axes.axhline(found.threshold_used, color=INK, linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.set_xlim(0.3, len(values) + 0.7)
    axes.set_xlabel("trial")
    axes.set_ylabel("remaining memorization")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(points, ax=axes, label="neurons off", pad=0.06)
    named = [10**power * digit for power in range(6) for digit in (1, 2, 5)]
    bar.set_ticks([count for count in named if lowest < count < highest] or [lowest], minor=False)
    bar.set_ticks([], minor=True)
    bar.ax.yaxis.set_major_formatter("{x:.0f}")
    bar.outline.set_edgecolor(INK)
    return as_plot(figure)


def certificate_plot(found: Localization) -> Plot:
    """Plot the remaining memorization with each neuron of one result on again; the result must have a certificate."""
    assert found.certificate is not None
    rows = sorted(found.certificate.each_on, key=lambda row: -row.score)
    named = len(rows) <= MAX_NAMED_BARS
    figure = new_figure(width=4.5 + 0.25 * max(0, len(rows) - 8), height=3.0)
    axes = figure.subplots()
    axes.bar(range(len(rows)), [row.score for row in rows], color=BEFORE, width=min(0.8, 0.15 * len(rows)))
    axes.axhline(found.certificate.threshold, color=INK, linestyle="--", linewidth=1)
    _name_line(axes, found.certificate.threshold, "τ")
    axes.set_ylim(0, 1.05)
    axes.set_xlim(-0.8, len(rows) - 0.2)
    axes.set_ylabel("score, neuron on again")
    if named:
        names = [f"{short_layer_name(row.layer)} #{row.index}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(rows)} neurons, highest score first")
    return as_plot(figure)


def _name_line(axes: Any, height: float, name: str) -> None:
    axes.text(1.01, height, name, transform=axes.get_yaxis_transform(), va="center", color=INK)


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure of at most `MAX_WIDTH`, in inches."""
    # pyplot is not used, because it would choose a display and hold a reference to every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(min(MAX_WIDTH, width), height), layout="constrained")


def as_plot(figure: Figure) -> Plot:
    """Encode a figure for light and dark pages. Axes, labels and legends get the colour of the text."""
    import matplotlib

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.tick_params(which="both", colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    buffer = io.BytesIO()
    # Text is written as text, and the file has no date and no random ids, so that equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_ext"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=_PIXELS, metadata={"Date": None})
    svg = buffer.getvalue().decode("utf-8")
    light, dark = (as_uri("image/svg+xml", svg.replace(INK, _INKS[page]).encode("utf-8")) for page in ("light", "dark"))
    width, height = (round(inches * _PIXELS) for inches in figure.get_size_inches())
    return Plot(light, dark, width, height)
