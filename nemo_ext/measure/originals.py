"""The training images of memorized prompts, from a CSV file that the user writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError
from nemo_ext.files import read_image
from nemo_ext.prompts import COLUMNS, Layout, read_table

if TYPE_CHECKING:
    from PIL.Image import Image

#: What a label means. The published list of memorized prompts has the same labels in its column `type`.
LABELS: Mapping[str, str] = {"VM": "verbatim", "TM": "template"}

_LAYOUT = Layout(
    what="the file of originals",
    wanted="wanted a CSV file with the columns prompt,image and, if known, label (VM or TM)",
    columns={**COLUMNS, "image": ("image",)},
    required=("prompt", "image"),
)


class Originals(Mapping[str, tuple["Image", ...]]):
    """The training images of prompts, an immutable mapping: prompt -> its training images, RGB, one or more.

    Args:
        images: prompt -> PIL images. They are converted to RGB.
        labels: prompt -> "VM" (the image comes back verbatim) or "TM" (a template of it comes back), for the prompts
            whose label is known.

    Raises:
        NemoError: a prompt has no image, or a label is unknown or belongs to a prompt without an image.
    """

    def __init__(self, images: Mapping[str, tuple[Image, ...]], labels: Mapping[str, str] | None = None) -> None:
        self._images = {prompt: tuple(one.convert("RGB") for one in several) for prompt, several in images.items()}
        self.labels: Mapping[str, str] = dict(labels or {})
        for prompt, several in self._images.items():
            if not several:
                raise NemoError(f"the prompt '{prompt}' has no training image: give one, or leave the prompt out")
        for prompt, label in self.labels.items():
            if label not in LABELS:
                raise NemoError(f"the label of '{prompt}' is '{label}': wanted {_names()}")
            if prompt not in self._images:
                raise NemoError(f"there is a label of '{prompt}', which has no training image")

    def __getitem__(self, prompt: str) -> tuple[Image, ...]:
        return self._images[prompt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)


def read_originals(path: str | os.PathLike[str]) -> Originals:
    """Read the training images that a CSV file lists.

    The first line names the columns: `prompt`, `image` and, if it is known, `label`, which may have the other names
    that `read_prompt_list` knows; other columns are ignored. The other lines have one image each; a prompt may have
    several. An image's path is relative to the CSV file. Whitespace around a prompt is removed, as `read_prompts` does,
    so that prompts match those of a prompt file.

    Args:
        path: a UTF-8 file with commas, semicolons or tabs between the columns.

    Returns:
        The images, and the labels.

    Raises:
        NemoError: the file or an image cannot be read, a column or value is missing, or one prompt has two labels. The
            message names the file and the line.
    """
    path = Path(path)
    images: dict[str, list[Image]] = {}
    labels: dict[str, str] = {}
    for line, row in read_table(path, _LAYOUT):
        where = f"{path}, line {line}"
        prompt, image = row["prompt"], row["image"]
        label = row.get("label", "").upper()
        if not prompt or not image:
            raise NemoError(f"{where}: the {'prompt' if image else 'image'} is empty: {_LAYOUT.wanted}")
        if label and label not in LABELS:
            raise NemoError(f"{where}: the label is '{row['label']}': wanted {_names()}, or nothing")
        if label and labels.setdefault(prompt, label) != label:
            raise NemoError(f"{where}: the label is {label}, and an earlier line of this prompt has {labels[prompt]}")
        images.setdefault(prompt, []).append(_open(path.parent / image, where))
    if not images:
        raise NemoError(f"{path} lists no image: {_LAYOUT.wanted}")
    return Originals({prompt: tuple(several) for prompt, several in images.items()}, labels)


def _open(path: Path, where: str) -> Image:
    if not path.is_file():
        raise NemoError(f"{where}: the image {path} does not exist; its path is relative to the CSV file")
    try:
        return read_image(path)
    except NemoError as error:
        raise NemoError(f"{where}: {error}") from error


def _names() -> str:
    return " or ".join(f"{label} ({meaning})" for label, meaning in LABELS.items())
