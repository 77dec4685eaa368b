"""The result of an evaluation: the values of each prompt, and their medians over prompts as in the paper's tables."""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_ext.evaluate.quality import Distances
from nemo_ext.evaluate.replication import COPY_THRESHOLDS, WithOriginals, share_above
from nemo_ext.files import replacing
from nemo_ext.results.folder import EVALUATION, EVALUATION_SUMMARY, EVALUATION_TABLE, prompt_name

#: The stages of every evaluation: no neuron off, the found ones off, as many random ones off.
STAGES = ("before", "after", "control")
ALL = "all"


@dataclass(frozen=True)
class StageMeasures:
    """The images of one prompt with one set of neurons off. A tuple has one value for each seed.

    Attributes:
        neurons: how many neurons were off.
        seed_similarity: the median similarity of two different seeds' images (`nemo_ext.evaluate.diversity`).
        originals: the comparison with the training images; None if they are not known.
        same_seed: the similarity with the same seed's image of the untouched model; None for that image itself.
        alignment: the alignment with the prompt, by CLIP; None if no CLIP model was given.
    """

    neurons: int
    seed_similarity: float
    originals: WithOriginals | None = None
    same_seed: tuple[float, ...] | None = None
    alignment: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Measure:
    """A column: one number for the images of one prompt at one stage.

    Attributes:
        name: the column's name.
        of: computes the number; None if it was not measured.
        is_share: whether it is a share of the images. Shares are averaged over prompts, and other measures have a
            median and a median absolute deviation.
        digits: the number of decimal places in tables.
    """

    name: str
    of: Callable[[StageMeasures], float | None]
    is_share: bool = False
    digits: int = 2


def measures(similarity: str) -> tuple[Measure, ...]:
    """All columns, in the order of the tables.

    Args:
        similarity: the short name of the similarity of images, "SSCD" or "pixels". A column is named after it, so that
            a substitute is never taken for SSCD.
    """
    copies = (
        Measure(f"share of {similarity}_orig > {threshold}", _compared(_share(threshold)), is_share=True)
        for threshold in COPY_THRESHOLDS
    )
    return (
        Measure("neurons off", lambda stage: stage.neurons, digits=0),
        Measure(f"{similarity}_orig", _compared(lambda found: _median(found.similarity))),
        Measure(f"{similarity}_orig, highest", _compared(lambda found: max(found.similarity))),
        *copies,
        Measure("share with other original", _compared(_share_instead), is_share=True),
        Measure(f"{similarity}_gen", lambda stage: _median(stage.same_seed)),
        Measure(f"{similarity} between seeds", lambda stage: stage.seed_similarity),
        Measure("CLIP alignment", lambda stage: _median(stage.alignment)),
        Measure("PDQ distance", _compared(lambda found: _median(found.hash_distance)), digits=0),
        Measure("pixel correlation", _compared(lambda found: _median(found.correlation))),
    )


def _compared(of: Callable[[WithOriginals], float | None]) -> Callable[[StageMeasures], float | None]:
    """Make a measure of the comparison with training images: None where there is none."""
    return lambda stage: None if stage.originals is None else of(stage.originals)


def _share(threshold: float) -> Callable[[WithOriginals], float]:
    return lambda found: share_above(found.similarity, threshold)


def _share_instead(found: WithOriginals) -> float:
    return sum(prompt is not None for prompt in found.instead) / len(found.instead)


@dataclass(frozen=True)
class PromptEvaluation:
    """All measures of one prompt.

    Attributes:
        index: the prompt's position in results.jsonl, counted from 0.
        prompt: the text.
        label: "VM" or "TM"; None if it is not known.
        verified: `Localization.verified`.
        before, after: no neuron off, and the found ones off.
        controls: for each draw as many random neurons off.
    """

    index: int
    prompt: str
    label: str | None
    verified: bool | None
    before: StageMeasures
    after: StageMeasures
    controls: tuple[StageMeasures, ...]

    def value(self, measure: Measure, stage: str) -> float | None:
        """The value of a measure at one of `STAGES`; that of the control is the median, or mean, over the draws."""
        stages = {"before": (self.before,), "after": (self.after,), "control": self.controls}[stage]
        values = [value for value in map(measure.of, stages) if value is not None]
        if not values:
            return None
        return statistics.fmean(values) if measure.is_share else statistics.median(values)


@dataclass(frozen=True)
class OrdinaryEvaluation:
    """What the union of all found neurons changes in the images of ordinary prompts, one image of each.

    Attributes:
        prompts: the number of prompts.
        neurons, control_neurons: how many neurons were off: the union of all found ones, and as many random ones.
        network: the network of the distances; None if there was none.
        frechet, kernel: what the distances are called, such as "FID" and "KID"; None without a network.
        distance_after, distance_control: how far the images are from those of the untouched model.
        same_seed_after, same_seed_control: for each prompt, the similarity with the image of the untouched model.
        alignment_before, alignment_after, alignment_control: for each prompt; None without CLIP.
    """

    prompts: int
    neurons: int
    control_neurons: int
    network: str | None
    frechet: str | None
    kernel: str | None
    distance_after: Distances | None
    distance_control: Distances | None
    same_seed_after: tuple[float, ...]
    same_seed_control: tuple[float, ...]
    alignment_before: tuple[float, ...] | None
    alignment_after: tuple[float, ...] | None
    alignment_control: tuple[float, ...] | None


@dataclass(frozen=True)
class SummaryRow:
    """One measure over the prompts of a group.

    Attributes:
        group: `ALL`, "VM" or "TM".
        stage: one of `STAGES`.
        measure: the measure's name.
        value: the median over prompts; for a share, the mean.
        deviation: the median absolute deviation from the median; None for a share.
        prompts: the number of prompts with a value.
    """

    group: str
    stage: str
    measure: str
    value: float
    deviation: float | None
    prompts: int


@dataclass(frozen=True)
class Evaluation:
    """Results measured on images.

    Attributes:
        prompts: the memorized prompts, in the order of results.jsonl.
        not_memorized: the number of results without neurons, which are not evaluated.
        ordinary: the evaluation on ordinary prompts; None if none were given.
        similarity: the full name of the similarity of images, `ImageSimilarity.name`.
        short_similarity: its short name, as in the names of columns.
        model: the fingerprint of the results' model, `Localization.model`.
        seeds, steps, guidance, scheduler: how the images were generated.
        draws: the number of random sets of neurons for each prompt.
        omitted: column -> the reason why it is missing, as a sentence.
        seconds: the wall time.
        reused_images: how many images were reused from an earlier run.
        detection: `DetectionTable.to_dict()`; None if no detectors were measured.
    """

    prompts: tuple[PromptEvaluation, ...]
    not_memorized: int
    ordinary: OrdinaryEvaluation | None
    similarity: str
    short_similarity: str
    model: str
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    scheduler: str
    draws: int
    omitted: Mapping[str, str]
    seconds: float
    reused_images: int
    detection: Mapping[str, Any] | None = None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns that have a value for at least one prompt."""
        return tuple(
            measure
            for measure in measures(self.short_similarity)
            if any(one.value(measure, stage) is not None for one in self.prompts for stage in STAGES)
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """`ALL`, and the labels of the prompts."""
        return (ALL, *sorted({one.label for one in self.prompts if one.label}, reverse=True))

    def summary(self) -> tuple[SummaryRow, ...]:
        """Median and median absolute deviation of each measure, for each group and stage."""
        rows = []
        for group in self.groups:
            members = [one for one in self.prompts if group in (ALL, one.label)]
            for measure in self.measures:
                for stage in STAGES:
                    values = [value for one in members if (value := one.value(measure, stage)) is not None]
                    if values:
                        middle, deviation = median_and_deviation(values)
                        value = statistics.fmean(values) if measure.is_share else middle
                        spread = None if measure.is_share else deviation
                        rows.append(SummaryRow(group, stage, measure.name, value, spread, len(values)))
        return tuple(rows)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each prompt whose images show another prompt's training image with the neurons off."""
        sentences = []
        for one in self.prompts:
            instead = () if one.after.originals is None else one.after.originals.instead
            for other in dict.fromkeys(prompt for prompt in instead if prompt is not None):
                sentences.append(
                    f"'{one.prompt}': {instead.count(other)} of {len(instead)} images after show the training image of "
                    f"'{other}'."
                )
        return tuple(sentences)

    def with_detection(self, detection: Mapping[str, Any]) -> Evaluation:
        """The same evaluation with the measurement of detectors."""
        return replace(self, detection=detection)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the summary as a dictionary for JSON."""
        return {**asdict(self), "summary": [asdict(row) for row in self.summary()]}

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write evaluation.json, evaluation.csv (prompts) and evaluation-summary.csv into a folder, each atomically.

        Returns:
            The three files.
        """
        files = tuple(Path(folder) / name for name in (EVALUATION, EVALUATION_TABLE, EVALUATION_SUMMARY))
        # The text is made before a file is touched, so an error leaves all of them as they were.
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(files[0]) as temporary:
            temporary.write_text(text, encoding="utf-8")
        columns = [measure.name for measure in self.measures]
        _write_csv(files[1], ("name", "prompt", "label", "verified", "stage", *columns), self._rows())
        summary = [tuple(asdict(row).values()) for row in self.summary()]
        _write_csv(files[2], ("group", "stage", "measure", "value", "deviation", "prompts"), summary)
        return files

    def _rows(self) -> Iterable[Sequence[Any]]:
        for one in self.prompts:
            fixed = (prompt_name(one.index, one.prompt), one.prompt, one.label, one.verified)
            for stage in STAGES:
                if stage != "control" or one.controls:
                    yield (*fixed, stage, *(one.value(measure, stage) for measure in self.measures))


def median_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)


def _median(values: Sequence[float] | None) -> float | None:
    return None if values is None else statistics.median(values)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
