"""The report: one HTML file that shows the results of several prompts.

The file contains its styles, plots and images, needs no JavaScript and loads no other file, so it can be sent by mail.
Prompts are untrusted text: they are escaped in the page, and their text is never part of a file name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.models.registry import short_layer_name
from nemo_ext.report.grid import image_grid
from nemo_ext.report.heat_map import layer_counts, neuron_map
from nemo_ext.report.overlap import frequency_plot, overlap_plot
from nemo_ext.report.plots import certificate_plot, score_plot, search_plot
from nemo_ext.report.summary import LOOKS, counts, summary_row
from nemo_ext.report.tables import ReportTable
from nemo_ext.results.folder import ORIGINAL, ResultsFolder, prompt_name
from nemo_ext.results.words import meaning, other_images, verdict_figures, verdict_headline

if TYPE_CHECKING:
    from PIL.Image import Image

    from nemo_ext.results.record import Localization

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt. Each of them is a path or a PIL image.

    Attributes:
        original: the training image; None if it is not known.
        before: seed -> image of the untouched model.
        after: seed -> image with the found neurons off.
    """

    original: Path | Image | None = None
    before: Mapping[int, Path | Image] = field(default_factory=dict)
    after: Mapping[int, Path | Image] = field(default_factory=dict)


def find_images(folder: str | Path, localizations: Sequence[Localization]) -> dict[int, PromptImages]:
    """Find the images in a results folder.

    Args:
        folder: the folder. If it is a file such as results.jsonl, no images are found.
        localizations: the results in the folder, in the order of results.jsonl.

    Returns:
        Position of the result -> its images. Results without images have no entry.
    """
    results = ResultsFolder(folder)
    found = {}
    for index, localization in enumerate(localizations):
        prompt = localization.prompt
        original = results.images_folder(index, prompt) / ORIGINAL
        images = PromptImages(
            original=original if original.is_file() else None,
            before=results.images(index, prompt, "before"),
            after=results.images(index, prompt, "after"),
        )
        if images.original or images.before or images.after:
            found[index] = images
    return found


def write_report(
    path: str | Path,
    localizations: Sequence[Localization],
    *,
    images: Mapping[int, PromptImages] | None = None,
    tables: Sequence[ReportTable] = (),
    title: str = "NeMo report",
) -> Path:
    """Write a self-contained HTML file that shows the results of several prompts.

    Equal results, images and tables give equal files.

    Args:
        path: the HTML file. It is written atomically.
        localizations: the results, in the order in which the page shows them.
        images: position in `localizations` -> the images of that prompt, as `find_images` returns them; None: no
            images.
        tables: further tables, which the page shows after its summary.
        title: the page's title.

    Returns:
        `path` as a `Path`.

    Raises:
        NemoError: there are no results, or an image cannot be read.
        OSError: the file cannot be written.
    """
    if not localizations:
        raise NemoError("there is nothing to report, because there are no results: run `nemo-ext localize` first")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short_layer_name"] = short_layer_name
    images = images or {}
    # The first of equal prompts is the one that others refer to.
    numbers = {found.prompt: number for number, found in reversed(list(enumerate(localizations, start=1)))}
    page = environment.get_template("page.html.jinja").render(
        title=title,
        counts=counts(localizations),
        rows=[summary_row(found) for found in localizations],
        scores_plot=score_plot(localizations),
        compared=any(found.verdict for found in localizations),
        tables=tables,
        map=neuron_map(localizations),
        frequencies=frequency_plot(localizations),
        overlap=overlap_plot(localizations),
        layers=layer_counts(localizations),
        prompts=[_section(index, found, images.get(index), numbers) for index, found in enumerate(localizations)],
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _section(
    index: int, found: Localization, images: PromptImages | None, numbers: Mapping[str, int]
) -> dict[str, Any]:
    """All values that the template shows for one prompt."""
    certificate, verdict = found.certificate, found.verdict
    return {
        "number": index + 1,
        "name": prompt_name(index, found.prompt),
        "found": found,
        "verdict": verdict,
        "headline": verdict_headline(found),
        "figures": verdict_figures(found),
        "look": LOOKS[meaning(found)],
        "replicates": [max(verdict.limits.excess(trial)) > 1 for trial in verdict.trials] if verdict else (),
        # A set that was tried twice is the result with its last trial.
        "final": max((i for i, trial in enumerate(verdict.trials) if trial == verdict.final), default=None)
        if verdict
        else None,
        "other_images": other_images(verdict) if verdict and found.memorized else 0,
        "grid": image_grid(found, images, number=index + 1, numbers=numbers),
        "search_plot": search_plot(found) if len(found.history) > 1 else None,
        "passed": sum(value <= found.threshold for _, value in found.history),
        "protocol": json.dumps(found.protocol.to_dict(), sort_keys=True),
        "certificate": certificate,
        "certificate_plot": certificate_plot(found) if certificate and certificate.each_on else None,
    }
