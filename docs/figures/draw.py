"""Draws the figures of docs/method.md: `python docs/figures/draw.py` writes two SVG files beside this script.

method.svg is a diagram of the method. measured.svg shows figures of the bundled model; all of its numbers are read from
nemo_ext/demo/model/figures.json, which examples/demo_model/measure.py wrote. With one version of matplotlib
the files have the same bytes on every run. `--out DIR` writes them, and a PNG of each to look at, to another folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).resolve().parent
FIGURES = FOLDER.parents[1] / "nemo_ext" / "demo" / "model" / "figures.json"

INK, MUTED, LINE = "#1f2933", "#5b6673", "#8a94a0"
BLUE, ORANGE, GREY, PAPER = "#2f6db5", "#d9730d", "#b8c0c9", "#f4f6f8"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "mathtext.default": "regular",
    "svg.fonttype": "path",
    "svg.hashsalt": "nemo_ext",  # otherwise the names inside the file are random
}


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", **options: Any) -> None:
    """A rounded box whose lower left corner is (x, y), with text in its middle."""
    look = {"facecolor": "white", "edgecolor": LINE, "linewidth": 1.1} | options
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", **look))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.35)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, both_ends: bool = False
) -> None:
    style = "<|-|>" if both_ends else "-|>"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=10, linewidth=1.1, color=color, shrinkA=0, shrinkB=0
        )
    )


def line(axes: Axes, points: Sequence[tuple[float, float]], color: str, style: str = "-") -> None:
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.1, linestyle=style, solid_capstyle="round")


def switch(axes: Axes, x: float, y: float, on: bool) -> None:
    """A neuron, crossed if it is off."""
    radius = 0.11
    color = BLUE if on else ORANGE
    axes.add_patch(Circle((x, y), radius, facecolor=BLUE if on else "white", edgecolor=color, linewidth=1.3))
    if not on:
        for sign in (1, -1):
            line(axes, [(x - 0.075, y - sign * 0.075), (x + 0.075, y + sign * 0.075)], color)


def method() -> Figure:
    """The method: from the text through the value layers to the score, and the same with neurons off."""
    figure = pyplot.figure(figsize=(11, 7.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11), ylim=(0, 7.1))
    axes.axis("off")
    _text_and_unet(axes)
    _value_layer(axes, 0.25, 0.25, 3.35, 2.75)
    _score(axes, 3.8, 0.25, 3.35, 2.75)
    _remaining(axes, 7.35, 0.25, 3.4, 2.75)
    return figure


def _text_and_unet(axes: Axes) -> None:
    box(axes, 0.25, 6.3, 1.5, 0.55, "prompt")
    box(axes, 2.25, 6.3, 1.6, 0.55, "text encoder")
    box(axes, 4.35, 6.3, 2.3, 0.55, "text embedding e")
    arrow(axes, (1.75, 6.575), (2.25, 6.575))
    arrow(axes, (3.85, 6.575), (4.35, 6.575))

    # Stable Diffusion 1: name, cross-attentions of the block, height of its place in the drawing.
    blocks = [
        ("down 0", 2, 4.75), ("down 1", 2, 4.45), ("down 2", 2, 4.15), ("down 3", 0, 3.85), ("mid", 1, 3.55),
        ("up 0", 0, 3.85), ("up 1", 3, 4.15), ("up 2", 3, 4.45), ("up 3", 3, 4.75),
    ]  # fmt: skip
    left, width, gap, height = 1.3, 0.66, 0.1, 0.66
    box(axes, 1.1, 3.4, 7.15, 2.45, facecolor=PAPER, edgecolor="none")
    axes.text(1.25, 3.53, "U-Net", color=MUTED, va="bottom")
    searched: list[float] = []
    bus = 5.62
    for place, (name, layers, y) in enumerate(blocks):
        x = left + place * (width + gap)
        box(axes, x, y, width, height)
        axes.text(x + width / 2, y + 0.18, name, ha="center", va="center", fontsize=8.5)
        for layer in range(layers):
            center = x + width / 2 + (layer - (layers - 1) / 2) * 0.19
            is_searched = not name.startswith("up")
            axes.add_patch(
                FancyBboxPatch(
                    (center - 0.065, y + 0.36),
                    0.13,
                    0.2,
                    boxstyle="round,pad=0,rounding_size=0.03",
                    facecolor=ORANGE if is_searched else GREY,
                    edgecolor="none",
                )
            )
            line(axes, [(center, bus), (center, y + 0.57)], ORANGE if is_searched else GREY)
            searched += [center] * is_searched
    first, last = left + width / 2 - 0.095, left + 8 * (width + gap) + width / 2 + 0.19
    line(axes, [(first, bus), (last, bus)], LINE)
    line(axes, [(5.5, 6.3), (5.5, bus)], LINE)

    axes.text(0.62, 5.08, "latents\n$x_T$ of a\nseed", ha="center", va="center", linespacing=1.3)
    arrow(axes, (0.98, 5.08), (left, 5.08))
    end = left + 8 * (width + gap) + width
    box(axes, 8.55, 4.72, 0.6, 0.72, "noise\nε")
    arrow(axes, (end, 5.08), (8.55, 5.08))
    box(axes, 9.55, 4.62, 1.2, 0.92, "noise\ndifference\nδ")
    arrow(axes, (9.15, 5.08), (9.55, 5.08))
    axes.text(10.15, 4.42, "δ = ε − $x_T$, each\nchannel scaled\nto [0, 1]", ha="center", va="top", color=MUTED,
              fontsize=9, linespacing=1.35)  # fmt: skip

    for y, color, text in ((6.72, ORANGE, "value layer, searched"), (6.42, GREY, "value layer, not searched")):
        axes.add_patch(
            FancyBboxPatch(
                (7.45, y - 0.1), 0.13, 0.2, boxstyle="round,pad=0,rounding_size=0.03", facecolor=color, edgecolor="none"
            )
        )
        axes.text(7.68, y, text, va="center", fontsize=9)
    # The enlarged value layer is one of those in the block down 1.
    line(axes, [(left + width + gap + 0.2, 4.45), (1.93, 3.0)], ORANGE, ":")


def _panel(axes: Axes, x: float, y: float, width: float, height: float, title: str) -> None:
    box(axes, x, y, width, height)
    axes.text(x + 0.18, y + height - 0.27, title, va="center", fontweight="bold")


def _value_layer(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    _panel(axes, x, y, width, height, "One value layer")
    for place in range(11):
        switch(axes, x + 0.33 + 0.27 * place, y + 1.98, on=place not in (3, 8))
    rows = [
        ("v = (e Wᵀ + b) · s", INK),
        ("s = 1: the neuron is on", BLUE),
        ("s = 0: the neuron is switched off", ORANGE),
        ("a = mean over tokens of |e Wᵀ + b|", INK),
        ("|a − μ| / σ > θ: a candidate", INK),
    ]
    for place, (text, color) in enumerate(rows):
        axes.text(x + 0.2, y + 1.55 - 0.315 * place, text, va="center", color=color)


def _deltas(axes: Axes, x: float, y: float, color: str, mark: str = "") -> list[float]:
    """δ of seeds 1, 2, 3 and S in a row, and the places of their middles."""
    places = []
    for name, offset in (("1", 0.0), ("2", 0.66), ("3", 1.32), ("S", 2.3)):
        axes.add_patch(
            FancyBboxPatch(
                (x + offset, y),
                0.46,
                0.42,
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor="white",
                edgecolor=color,
                linewidth=1.2,
            )
        )
        axes.text(x + offset + 0.23, y + 0.2, f"δ{mark}$_{{{name}}}$", ha="center", va="center", color=color)
        places.append(x + offset + 0.23)
    axes.text(x + 2.04, y + 0.2, "…", ha="center", va="center", color=color)
    return places


def _score(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    _panel(axes, x, y, width, height, "Score: no neuron is off")
    places = _deltas(axes, x + 0.3, y + 1.62, BLUE)
    for first, second, depth in ((0, 1, 0.14), (1, 2, 0.14), (0, 2, 0.26), (0, 3, 0.38)):
        low = y + 1.62 - depth
        points = [(places[first], y + 1.6), (places[first], low), (places[second], low), (places[second], y + 1.6)]
        line(axes, points, LINE)
    text = "Similarity of the δ of every two seeds;\nthe highest is the score of the prompt.\nSeeds above τ are kept."
    axes.text(x + 0.2, y + 0.55, text, va="center", linespacing=1.55, fontsize=9.5)


def _remaining(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    _panel(axes, x, y, width, height, "Remaining memorization")
    above = _deltas(axes, x + 0.3, y + 1.8, BLUE)
    _deltas(axes, x + 0.3, y + 1.06, ORANGE, "′")
    for place in above:
        arrow(axes, (place, y + 1.79), (place, y + 1.49), LINE, both_ends=True)
    text = (
        "δ′ is δ with a set of neurons off.\n"
        "Similarity of δ and δ′ of each kept seed;\n"
        "the highest remains. At most τ: silenced."
    )
    axes.text(x + 0.2, y + 0.55, text, va="center", linespacing=1.55, fontsize=9.5)


def measured() -> Figure:
    """Scores of the bundled model's memorized captions, and their images, before and after."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    captions = figures["captions"]
    scores = figures["scores"]
    rows = range(len(captions), 0, -1)
    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(11, 6.2))
    figure.subplots_adjust(left=0.315, right=0.98, top=0.845, bottom=0.12, wspace=0.13)

    before = [caption["score_before"] for caption in captions]
    after = [caption["score_after"] for caption in captions]
    _pairs(left, rows, before, after)
    left.axvspan(scores["ordinary_mean"], scores["ordinary_highest"], color=GREY, alpha=0.35, linewidth=0,
                 label="ordinary captions, mean to highest")  # fmt: skip
    left.axvline(scores["threshold"], color=INK, linewidth=1.2, linestyle="--", label=f"τ = {scores['threshold']:.3f}")
    left.set(
        xlim=(0, 1), xlabel="similarity of noise differences\n(first denoising step)", ylim=(0.3, len(captions) + 0.7)
    )
    left.set_yticks(list(rows), [caption["caption"] for caption in captions])
    left.set_title("Score, and remaining memorization", fontsize=11, fontweight="bold", loc="left")

    def medians(name: str) -> list[float]:
        return [median(caption[f"with_original_{name}"]) for caption in captions]

    _pairs(right, rows, medians("before"), medians("after"))
    right.plot(medians("without_others"), rows, "o", markerfacecolor="none", markeredgecolor=INK, markersize=9.5,
               markeredgewidth=0.9, label="neurons of all other captions off")  # fmt: skip
    right.set(xlim=(-0.2, 1), xlabel="SSCD with the training image\n(median of four seeds)")
    right.set_title("Images", fontsize=11, fontweight="bold", loc="left")

    for axes in (left, right):
        axes.grid(axis="x", color=GREY, alpha=0.5, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in (left, right):
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def _pairs(axes: Axes, rows: Sequence[int], before: Sequence[float], after: Sequence[float]) -> None:
    axes.hlines(rows, after, before, color=LINE, linewidth=1.1, zorder=1)
    axes.plot(before, rows, "o", color=BLUE, markersize=6.5, label="no neuron off")
    axes.plot(after, rows, "o", color=ORANGE, markersize=6.5, label="found neurons off")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/method.md.")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="another folder; adds PNG files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for draw in (method, measured):
            figure = draw()
            figure.savefig(out / f"{draw.__name__}.svg", metadata={"Date": None}, facecolor="white")
            if out.resolve() != FOLDER:
                figure.savefig(out / f"{draw.__name__}.png", dpi=110, facecolor="white")
            pyplot.close(figure)


if __name__ == "__main__":
    main()
