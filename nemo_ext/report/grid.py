"""The grid of one prompt's images: the training image, and one column per seed without and with the neurons off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ext.report.images import data_uri

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from nemo_ext.report.page import PromptImages
    from nemo_ext.results.record import Localization, Verdict


@dataclass(frozen=True)
class Mark:
    """What an image turned out to be: `words`, and its `kind`, which is "good", "bad" or "plain"."""

    kind: str
    words: str


@dataclass(frozen=True)
class Cell:
    """An image of one seed.

    Attributes:
        uri: the image as a data URI; None if there is no image of this seed.
        alt: what the image shows, for readers who do not see it.
        marks: what the image turned out to be; empty if that is not known.
    """

    uri: str | None
    alt: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class FigureRow:
    """A similarity of every seed's image.

    Attributes:
        label: what the image is compared with.
        values: the similarity for each column; None if it is not known.
        limit: the similarity above which the image is a copy, if the verdict depends on these values. Values above it
            are marked.
    """

    label: str
    values: tuple[float | None, ...]
    limit: float | None = None


@dataclass(frozen=True)
class Stage:
    """The rows of the images without, or with, the neurons off.

    Attributes:
        title: which images these are.
        cells: one for each column.
        figures: the rows of similarities below the images.
    """

    title: str
    cells: tuple[Cell, ...]
    figures: tuple[FigureRow, ...]


@dataclass(frozen=True)
class Substitute:
    """Another prompt's training image, which appears in place of this prompt's.

    Attributes:
        seeds: the seeds whose images show it.
        prompt: the prompt whose training image it is.
        number: the number of this prompt in the report; None if the report does not contain it.
    """

    seeds: tuple[int, ...]
    prompt: str
    number: int | None


@dataclass(frozen=True)
class Grid:
    """All images of one prompt, with their similarities.

    Attributes:
        seeds: the seed of each column.
        original: the training image as a data URI; None if it is not known.
        stages: the untouched model, and the model with the neurons off; without stages that have neither images nor
            figures.
        substitutes: the other prompts' training images that appear with the neurons off.
    """

    seeds: tuple[int, ...]
    original: str | None
    stages: tuple[Stage, ...]
    substitutes: tuple[Substitute, ...]


def image_grid(
    found: Localization, images: PromptImages | None, *, number: int, numbers: Mapping[str, int] | None = None
) -> Grid | None:
    """Put the images of one prompt and the figures of its verdict together, by their seeds.

    A seed with an image and no figures is shown without figures, and a seed with figures and no image without the
    image.

    Args:
        found: the result.
        images: its images; None if there are none.
        number: the prompt's number in the report.
        numbers: prompt -> number of all prompts in the report, for images that appear in place of this prompt's.

    Returns:
        The grid; None if there are neither images nor a verdict.

    Raises:
        NemoError: an image cannot be read.
    """
    before, after = (images.before, images.after) if images else ({}, {})
    verdict = found.verdict
    seeds = tuple(sorted({*before, *after, *(verdict.seeds if verdict else ())}))
    original = data_uri(images.original) if images and images.original else None
    if not seeds and original is None:
        return None
    stages = []
    if before or verdict:
        stages.append(_before(seeds, before, verdict, number, found.memorized))
    # If nothing was searched, no neurons are off, and the verdict repeats the figures of the untouched model.
    if after or (verdict and found.memorized):
        stages.append(_after(seeds, after, verdict if found.memorized else None, number, len(found.neurons)))
    return Grid(seeds, original, tuple(stages), _substitutes(verdict, numbers or {}))


def _before(
    seeds: Sequence[int],
    images: Mapping[int, Path | Image],
    verdict: Verdict | None,
    number: int,
    memorized: bool,
) -> Stage:
    figures: list[FigureRow] = []
    marks: dict[int, tuple[Mark, ...]] = {}
    if verdict is not None:
        # A prompt that is not memorized has nothing to replicate, so its images get no marks.
        limit = verdict.limits.remaining if memorized else verdict.threshold
        for seed, value in zip(verdict.seeds, verdict.before, strict=True) if memorized else ():
            marks[seed] = (Mark("plain", "replicates" if value > limit else "differs"),)
        figures.append(_row("similarity with another seed's image", seeds, verdict, verdict.before, limit))
        if verdict.originals_before is not None:
            figures.append(_row("similarity with the training image", seeds, verdict, verdict.originals_before))
    alt = f"Prompt {number}, seed {{seed}}, untouched model"
    return Stage("Before: the untouched model", _cells(seeds, images, alt, marks), tuple(figures))


def _after(
    seeds: Sequence[int], images: Mapping[int, Path | Image], verdict: Verdict | None, number: int, neurons: int
) -> Stage:
    figures: list[FigureRow] = []
    marks: dict[int, tuple[Mark, ...]] = {}
    if verdict is not None:
        final, limits, originals = verdict.final, verdict.limits, verdict.originals_after
        copies = [excess > 1 for excess in limits.excess(final)]
        for place, (seed, copy) in enumerate(zip(verdict.seeds, copies, strict=True)):
            replaced = verdict.instead is not None and verdict.instead[place] is not None
            # An image that differs because it is another prompt's is no success.
            marks[seed] = (
                Mark("bad", "still replicates") if copy else Mark("plain" if replaced else "good", "differs"),
            )
            if replaced:
                marks[seed] += (Mark("bad", "another image"),)
        # The training image is compared like an image of the untouched model, if it is known.
        or_original = "" if originals is None else " or the training image"
        for label, values, limit in (
            (f"similarity with another seed's image before{or_original}", final.remaining, limits.remaining),
            ("similarity with another seed's image after", final.diversity, limits.diversity),
        ):
            figures.append(_row(label, seeds, verdict, values, limit))
        if originals is not None:
            figures.append(_row("similarity with the training image", seeds, verdict, originals))
    off = f"{neurons} neuron{'' if neurons == 1 else 's'} off"
    alt = f"Prompt {number}, seed {{seed}}, {off}"
    return Stage(f"After: {off}", _cells(seeds, images, alt, marks), tuple(figures))


def _cells(
    seeds: Sequence[int],
    images: Mapping[int, Path | Image],
    alt: str,
    marks: Mapping[int, tuple[Mark, ...]],
) -> tuple[Cell, ...]:
    cells = []
    for seed in seeds:
        words = "".join(f", {mark.words}" for mark in marks.get(seed, ()))
        uri = data_uri(images[seed]) if seed in images else None
        cells.append(Cell(uri, alt.format(seed=seed) + words, marks.get(seed, ())))
    return tuple(cells)


def _row(
    label: str, seeds: Sequence[int], verdict: Verdict, values: Sequence[float], limit: float | None = None
) -> FigureRow:
    known = dict(zip(verdict.seeds, values, strict=True))
    return FigureRow(label, tuple(known.get(seed) for seed in seeds), limit)


def _substitutes(verdict: Verdict | None, numbers: Mapping[str, int]) -> tuple[Substitute, ...]:
    if verdict is None or verdict.instead is None:
        return ()
    shown: dict[str, list[int]] = {}
    for seed, prompt in zip(verdict.seeds, verdict.instead, strict=True):
        if prompt is not None:
            shown.setdefault(prompt, []).append(seed)
    return tuple(Substitute(tuple(seeds), prompt, numbers.get(prompt)) for prompt, seeds in shown.items())
