"""What a search found, for people to look at: one HTML file, and sheets of images.

The HTML holds everything in itself (styles, plots, images), needs no JavaScript, loads nothing, and can be
sent by mail. Prompts are other people's text: they are escaped where they are shown, and no file is ever
named after one (see `nemo_ext.files.prompt_name`).
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.atomic import replacing
from nemo_ext.errors import NemoError
from nemo_ext.files import prompt_name
from nemo_ext.neurons import NeuronSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from nemo_ext.results.record import Localization

#: Longest side, in pixels, of an image in the report: a strip is looked at, the files beside it are the record.
THUMBNAIL_SIZE = 256

#: Bars beyond this many can't carry readable names.
MAX_NAMED_BARS = 32

_BEFORE, _AFTER, _THRESHOLD = "#c8553d", "#2a7f9e", "#8a8a8a"
#: Stands for the page's text colour in a plot, and is replaced for the light and the dark page.
_INK = "#0f0e0d"
_INKS = {"light": "#222222", "dark": "#e4e4e4"}


@dataclass(frozen=True)
class PromptImages:
    """Images that go with one prompt; each a path or a PIL image.

    Attributes:
        original: The training image, where it is known.
        before: Seed -> image of the untouched model.
        after: Seed -> image with the found neurons switched off.
    """

    original: Path | Image | None = None
    before: Mapping[int, Path | Image] = field(default_factory=dict)
    after: Mapping[int, Path | Image] = field(default_factory=dict)


def find_images(folder: str | Path, localizations: Sequence[Localization]) -> dict[int, PromptImages]:
    """Find the images that lie beside results.

    They are looked for in `folder/images/<prompt_name>/`, as `original.png`, `before-<seed>.png` and
    `after-<seed>.png`.

    Returns:
        Position of the localization -> its images; prompts without images are left out.
    """
    found = {}
    for index, localization in enumerate(localizations):
        own = Path(folder) / "images" / prompt_name(index, localization.prompt)
        original = own / "original.png"
        images = PromptImages(
            original=original if original.is_file() else None,
            before=_by_seed(own, "before"),
            after=_by_seed(own, "after"),
        )
        if images.original or images.before or images.after:
            found[index] = images
    return found


def _by_seed(folder: Path, stem: str) -> dict[int, Path | Image]:
    seeds: dict[int, Path | Image] = {}
    for file in folder.glob(f"{stem}-*.png"):
        match = re.fullmatch(rf"{stem}-(\d+)", file.stem)
        if match:
            seeds[int(match[1])] = file
    return dict(sorted(seeds.items()))


def write_report(
    path: str | Path,
    localizations: Sequence[Localization],
    *,
    images: Mapping[int, PromptImages] | None = None,
    title: str = "NeMo report",
) -> Path:
    """Write one self-contained HTML file about some prompts.

    Args:
        path: The HTML file; it appears whole or not at all.
        localizations: The results, in the order of the report.
        images: Position in `localizations` -> images of that prompt (see `find_images`).
        title: The page's title.

    Returns:
        The path written.

    Raises:
        NemoError: There are no localizations, an image can't be read, or the file can't be written.
    """
    if not localizations:
        raise NemoError("there is nothing to report: no localization was given")
    from jinja2 import Environment, StrictUndefined

    images = images or {}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    memorized = [found for found in localizations if found.memorized]
    union = _union(memorized)
    page = environment.from_string(template).render(
        title=title,
        total=len(localizations),
        memorized=len(memorized),
        silenced=sum(_is_silenced(found) for found in memorized),
        neurons=len(union),
        layers={layer: len(indices) for layer, indices in union.items()},
        scores_plot=_score_plot(localizations),
        layers_plot=_layer_plot(memorized) if union else None,
        prompts=[_section(index, found, images.get(index)) for index, found in enumerate(localizations)],
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _is_silenced(found: Localization) -> bool:
    """Whether switching the neurons off brought the score to the threshold itself, not to a raised one."""
    return found.score_after is not None and found.score_after <= found.threshold


def _union(localizations: Iterable[Localization]) -> NeuronSet:
    """The neurons of all results together."""
    union = NeuronSet()
    for found in localizations:
        union |= found.neurons
    return union


def short_layer(layer: str) -> str:
    """A value layer's name, short enough for a plot: `down 0.1` for `down_blocks.0.attentions.1…to_v`."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.to_v", layer)
    if match:
        name = f"{match[1]} {match[2]}.{match[3]}"
        return name if match[4] == "0" else f"{name}.{match[4]}"
    match = re.fullmatch(r"mid_block\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.to_v", layer)
    if match:
        return "mid" if match[1] == match[2] == "0" else f"mid {match[1]}.{match[2]}"
    return layer


def _section(index: int, found: Localization, images: PromptImages | None) -> dict[str, Any]:
    """Everything the template shows of one prompt."""
    certificate = found.certificate
    return {
        "number": index + 1,
        "anchor": f"prompt-{index + 1}",
        "name": prompt_name(index, found.prompt),
        "found": found,
        "silenced": _is_silenced(found),
        "neurons": [
            {"layer": layer, "short": short_layer(layer), "indices": list(indices)}
            for layer, indices in found.neurons.items()
        ],
        "protocol": json.dumps(found.protocol.to_dict(), sort_keys=True),
        "certificate": certificate,
        "certificate_plot": (_certificate_plot(index, found) if certificate and certificate.each_on else None),
        "original": _data_uri(images.original) if images and images.original else None,
        "strips": [
            (name, {seed: _data_uri(image) for seed, image in strip.items()})
            for name, strip in (("before", images.before), ("after", images.after))
            if strip
        ]
        if images
        else [],
    }


# Plots. Prompts never enter them: text from users would meet matplotlib's own markup.


def _score_plot(localizations: Sequence[Localization]) -> dict[str, str]:
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


def _layer_plot(localizations: Sequence[Localization]) -> dict[str, str]:
    from matplotlib.ticker import MaxNLocator

    union = _union(localizations)
    figure = _figure(width=max(4.5, 1.2 + 0.75 * len(union.layers)), height=3.0)
    axes = figure.subplots()
    bars = axes.bar(
        [short_layer(layer) for layer in union],
        [len(indices) for indices in union.values()],
        color=_AFTER,
    )
    axes.bar_label(bars, color=_INK)
    axes.set_ylabel("neurons")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", rotation=30 if len(union.layers) > 6 else 0)
    return _svg_uris(figure)


def _certificate_plot(index: int, found: Localization) -> dict[str, str]:
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
        names = [f"{short_layer(row.layer)} #{row.index}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=7)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(rows)} neurons, highest score first")
    return _svg_uris(figure)


def _figure(*, width: float, height: float) -> Figure:
    # The object interface: pyplot would pick a display and keep every figure alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg_uris(figure: Figure) -> dict[str, str]:
    """A figure as data URIs, one for a light page and one for a dark one."""
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
    # Text stays text, and neither a date nor random ids enter: equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_ext"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode("utf-8")
    return {page: _as_uri("image/svg+xml", svg.replace(_INK, ink).encode("utf-8")) for page, ink in _INKS.items()}


# Images.


def _data_uri(image: Path | Image) -> str:
    """An image as a data URI, made smaller where it is larger than a thumbnail."""
    picture = open_image(image)
    buffer = io.BytesIO()
    if max(picture.size) > THUMBNAIL_SIZE:
        picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        picture.save(buffer, format="JPEG", quality=90)
        return _as_uri("image/jpeg", buffer.getvalue())
    picture.save(buffer, format="PNG", optimize=True)
    return _as_uri("image/png", buffer.getvalue())


def _as_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def open_image(image: Path | Image) -> Image:
    """An RGB copy of an image, or a sentence about why there is none."""
    from PIL import Image as images

    if not isinstance(image, (str, Path)):
        return image.convert("RGB").copy()
    try:
        with images.open(image) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, images.DecompressionBombError) as error:
        raise NemoError(f"the image {image} can't be read: {error}") from error


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Path | Image | None]]],
    *,
    columns: Sequence[str] = (),
    size: int = 128,
) -> Image:
    """Put images on one sheet, in rows with a name to their left.

    Args:
        rows: A row's name and its images; None leaves a place empty.
        columns: Names above the columns.
        size: Side of an image's place, in pixels.

    Returns:
        The sheet, an RGB image with a white ground.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    text_size = max(10, size // 10)
    font = ImageFont.load_default(text_size)
    gap, margin = max(2, size // 32), max(8, size // 16)
    line = int(text_size * 1.3)
    label_width = size + size // 4 if any(name for name, _ in rows) else 0
    header = line + gap if columns else 0
    count = max((len(row) for _, row in rows), default=0)
    sheet = images.new(
        "RGB",
        (
            2 * margin + label_width + count * (size + gap),
            2 * margin + header + len(rows) * (size + gap),
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    left = margin + label_width
    for place, name in enumerate(columns[:count]):
        draw.text((left + place * (size + gap), margin), name, fill="black", font=font)
    for number, (name, row) in enumerate(rows):
        top = margin + header + number * (size + gap)
        for place, text in enumerate(_wrap(draw, name, label_width - margin, font, size // line)):
            draw.text((margin, top + place * line), text, fill="black", font=font)
        for place, image in enumerate(row):
            if image is None:
                continue
            picture = open_image(image).resize((size, size), images.Resampling.LANCZOS)
            sheet.paste(picture, (left + place * (size + gap), top))
    return sheet


def _wrap(draw: Any, text: str, width: int, font: Any, lines: int) -> list[str]:
    """Break text into at most `lines` lines of `width` pixels, the last one cut short with an ellipsis."""
    wrapped: list[str] = []
    for word in text.split():
        joined = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and draw.textlength(joined, font=font) <= width:
            wrapped[-1] = joined
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " …"]
    return wrapped
