"""The training images of memorized prompts, from a CSV file that the user writes."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError
from nemo_ext.files import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

#: What a label means. The published list of memorized prompts has the same labels in its column `type`.
LABELS: Mapping[str, str] = {"VM": "verbatim", "TM": "template"}

_COLUMNS = ("prompt", "image")
_LAYOUT = "wanted a CSV file with the columns prompt,image and, if known, label (VM or TM)"


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

    The first line names the columns: `prompt`, `image` and, if it is known, `label`; other columns are ignored. The
    other lines have one image each; a prompt may have several. An image's path is relative to the CSV file. Whitespace
    around a prompt is removed, as `read_prompts` does, so that prompts match those of a prompt file.

    Args:
        path: a UTF-8 file with commas between the columns.

    Returns:
        The images, and the labels.

    Raises:
        NemoError: the file or an image cannot be read, a column or value is missing, or one prompt has two labels. The
            message names the file and the line.
    """
    path = Path(path)
    images: dict[str, list[Image]] = {}
    labels: dict[str, str] = {}
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        prompt, image = row["prompt"], row["image"]
        label = row.get("label", "").upper()
        if not prompt or not image:
            raise NemoError(f"{where}: the {'prompt' if image else 'image'} is empty: {_LAYOUT}")
        if label and label not in LABELS:
            raise NemoError(f"{where}: the label is '{row['label']}': wanted {_names()}, or nothing")
        if label and labels.setdefault(prompt, label) != label:
            raise NemoError(f"{where}: the label is {label}, and an earlier line of this prompt has {labels[prompt]}")
        images.setdefault(prompt, []).append(_open(path.parent / image, where))
    if not images:
        raise NemoError(f"{path} lists no image: {_LAYOUT}")
    return Originals({prompt: tuple(several) for prompt, several in images.items()}, labels)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of the file with the numbers of the lines in which they end; values without whitespace around them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            missing = [column for column in _COLUMNS if column not in names]
            if missing:
                raise NemoError(f"{path}, line 1: there is no column {' and no column '.join(missing)}: {_LAYOUT}")
            reader.fieldnames = names
            for row in reader:
                if None in row or None in row.values():
                    raise NemoError(
                        f"{path}, line {reader.line_num}: there are {'more' if None in row else 'fewer'} values than "
                        "columns: put a text that holds a comma into double quotes"
                    )
                yield reader.line_num, {name: value.strip() for name, value in row.items()}
    except FileNotFoundError as error:
        raise NemoError(f"the file of originals {path} does not exist: {_LAYOUT}") from error
    except UnicodeDecodeError as error:
        raise NemoError(f"{path} is not UTF-8 text (byte {error.start}): {_LAYOUT}") from error
    except csv.Error as error:
        raise NemoError(f"{path}, after line {reader.line_num}: {error}: {_LAYOUT}") from error
    except OSError as error:
        raise NemoError(f"the file of originals {path} cannot be read: {error.strerror or error}") from error


def _open(path: Path, where: str) -> Image:
    if not path.is_file():
        raise NemoError(f"{where}: the image {path} does not exist; its path is relative to the CSV file")
    try:
        return read_image(path)
    except NemoError as error:
        raise NemoError(f"{where}: {error}") from error


def _names() -> str:
    return " or ".join(f"{label} ({meaning})" for label, meaning in LABELS.items())
