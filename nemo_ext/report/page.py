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
from nemo_ext.neurons import NeuronSet
from nemo_ext.report.images import data_uri
from nemo_ext.report.plots import certificate_plot, layer_plot, score_plot
from nemo_ext.results.folder import ORIGINAL, ResultsFolder, prompt_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from nemo_ext.results.record import Localization


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
    title: str = "NeMo report",
) -> Path:
    """Write a self-contained HTML file that shows the results of several prompts.

    Equal results and images give equal files.

    Args:
        path: the HTML file. It is written atomically.
        localizations: the results, in the order in which the page shows them.
        images: position in `localizations` -> the images of that prompt, as `find_images` returns them; None: no
            images.
        title: the page's title.

    Returns:
        `path` as a `Path`.

    Raises:
        NemoError: there are no results, or an image cannot be read.
        OSError: the file cannot be written.
    """
    if not localizations:
        raise NemoError("there is nothing to report, because there are no results: run `nemo-ext localize` first")
    from jinja2 import Environment, StrictUndefined

    images = images or {}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    memorized = [found for found in localizations if found.memorized]
    union = NeuronSet.union(found.neurons for found in memorized)
    page = environment.from_string(template).render(
        title=title,
        total=len(localizations),
        memorized=len(memorized),
        silenced=sum(found.below_threshold for found in memorized),
        neurons=len(union),
        layers={layer: len(indices) for layer, indices in union.items()},
        scores_plot=score_plot(localizations),
        layers_plot=layer_plot(memorized) if union else None,
        prompts=[_section(index, found, images.get(index)) for index, found in enumerate(localizations)],
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _section(index: int, found: Localization, images: PromptImages | None) -> dict[str, Any]:
    """All values that the template shows for one prompt."""
    certificate = found.certificate
    return {
        "number": index + 1,
        "anchor": f"prompt-{index + 1}",
        "name": prompt_name(index, found.prompt),
        "found": found,
        "silenced": found.below_threshold,
        "neurons": [
            {"layer": layer, "short": short_layer_name(layer), "indices": list(indices)}
            for layer, indices in found.neurons.items()
        ],
        "protocol": json.dumps(found.protocol.to_dict(), sort_keys=True),
        "certificate": certificate,
        "certificate_plot": (certificate_plot(found) if certificate and certificate.each_on else None),
        "original": data_uri(images.original) if images and images.original else None,
        "strips": [
            (name, {seed: data_uri(image) for seed, image in strip.items()})
            for name, strip in (("before", images.before), ("after", images.after))
            if strip
        ]
        if images
        else [],
    }
