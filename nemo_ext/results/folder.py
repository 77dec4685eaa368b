"""The results folder. This is the only module that knows its files, how results are appended, and how it is locked.

    results.jsonl        one line per prompt, a JSON object (`Localization.to_dict`), in the order of the prompts
    parts/               results that are not in results.jsonl yet (`nemo_ext/results/job.py`)
    neurons/NAME.json    the neurons of a memorized prompt
    images/NAME/         original.png, before-SEED.png and after-SEED.png: the images that the verdict is about
    evaluation.json      an evaluation: everything (`Evaluation.to_dict`)
    evaluation.csv       an evaluation: one row for each prompt and stage
    evaluation-summary.csv  an evaluation: one row for each group of prompts, stage and measure
    evaluation/NAME/     the images of an evaluation, before-SEED.png, after-SEED.png and control-DRAW-SEED.png, and
                         images.json with their settings
    evaluation/ordinary/NAME/  the same for its ordinary prompts; NAME has the position in their file

NAME is `prompt_name`: the prompt's position in results.jsonl and a hash of its text. Each result is appended with one
write as soon as it is found, so the cost of an append does not grow with the number of results. Only one process writes
at a time: it locks the folder, and the operating system releases the lock when the process ends for any reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_ext.errors import NemoError
from nemo_ext.files import locked
from nemo_ext.reading import parse_json, refusing
from nemo_ext.results.record import Localization

RESULTS = "results.jsonl"
NEURONS = "neurons"
IMAGES = "images"
PARTS = "parts"
ORIGINAL = "original.png"
EVALUATED = "evaluation"
ORDINARY = "ordinary"
IMAGE_SETTINGS = "images.json"
EVALUATION = "evaluation.json"
EVALUATION_TABLE = "evaluation.csv"
EVALUATION_SUMMARY = "evaluation-summary.csv"


def prompt_name(index: int, prompt: str) -> str:
    """The name of a prompt's files: its position in results.jsonl, and a hash of its text.

    The text itself is never part of a path, because it can contain slashes or dots, or be too long for a file name.

    Args:
        index: the position, counted from 0.
        prompt: the text.
    """
    return f"{index:04d}-{hashlib.sha256(prompt.encode('utf-8')).hexdigest()[:8]}"


def image_name(stage: str, seed: int) -> str:
    """The name of an image's file; `stage` is "before" or "after", relative to switching the neurons off, or
    "control-DRAW" if random neurons were off."""
    return f"{stage}-{seed}.png"


class ResultsFolder:
    """A folder of results. It does not have to exist.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def results(self) -> Path:
        """The file with all results."""
        return self.path / RESULTS

    @property
    def parts(self) -> Path:
        """The folder with the finished parts of a job that is not complete."""
        return self.path / PARTS

    @property
    def detector_parts(self) -> Path:
        """The folder with the detectors' scores in an evaluation that is not complete."""
        return self.path / EVALUATED / "detectors.parts"

    def neurons_file(self, index: int, prompt: str) -> Path:
        """The file with one prompt's neurons."""
        return self.path / NEURONS / f"{prompt_name(index, prompt)}.json"

    def images_folder(self, index: int, prompt: str) -> Path:
        """The folder with one prompt's images."""
        return self.path / IMAGES / prompt_name(index, prompt)

    def images_of_any_position(self, prompt: str) -> Iterator[Path]:
        """The existing folders with a prompt's images, whatever position in results.jsonl their name says."""
        hashed = prompt_name(0, prompt).partition("-")[2]
        return (self.path / IMAGES).glob(f"[0-9]*-{hashed}")

    def ordinary_folder(self, index: int, prompt: str) -> Path:
        """The folder with the images of one ordinary prompt of an evaluation; `index` is its position among them."""
        return self.path / EVALUATED / ORDINARY / prompt_name(index, prompt)

    def evaluated_folder(self, index: int, prompt: str) -> Path:
        """The folder with one prompt's images of an evaluation."""
        return self.path / EVALUATED / prompt_name(index, prompt)

    def images(self, index: int, prompt: str, stage: str) -> dict[int, Path]:
        """The existing images of one prompt: seed -> file, in the order of the seeds. `stage` as for `image_name`.

        These are the images of the verification. If there are none, they are those of an evaluation.
        """
        for folder in (self.images_folder(index, prompt), self.evaluated_folder(index, prompt)):
            found = {}
            for file in folder.glob(f"{stage}-*.png"):
                if match := re.fullmatch(rf"{stage}-(\d+)", file.stem):
                    found[int(match[1])] = file
            if found:
                return dict(sorted(found.items()))
        return {}

    def save_neurons(self, results: Sequence[Localization]) -> int:
        """Write each non-empty set of neurons to a file of its own, and return the number of these files.

        Args:
            results: all results in the folder, in the order of results.jsonl.
        """
        with_neurons = [(index, found) for index, found in enumerate(results) if len(found.neurons)]
        for index, found in with_neurons:
            found.neurons.save(self.neurons_file(index, found.prompt))
        return len(with_neurons)

    def read(self) -> list[Localization]:
        """Read all results, in the order of the file.

        Raises:
            NemoError: results.jsonl does not exist, or a line of it is not a result.
        """
        return read_results(self.results)

    @contextmanager
    def writing(self, *, anew: bool = False) -> Iterator[ResultsWriter]:
        """Lock the folder for the length of the block, and repair the last line if a killed process left it incomplete.

        Args:
            anew: if False, new results are appended to the existing ones. If True, the first new result replaces them.

        Yields:
            The writer, which appends results.

        Raises:
            NemoError: another process writes to the folder, or a line of results.jsonl is not a result.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another process writes results to {self.path}: wait until it has ended, or choose another folder"
        with locked(self.path, busy):
            existing: list[Localization] = []
            if not anew and self.results.exists():
                _mend_last_line(self.results)
                existing = self.read() if self.results.stat().st_size else []
            yield ResultsWriter(self.results, existing, anew)


class ResultsWriter:
    """Appends results to a folder that this process has locked.

    Attributes:
        path: the file results.jsonl.
        kept: the results that were in the folder before.
    """

    def __init__(self, path: Path, kept: Sequence[Localization], anew: bool) -> None:
        self.path = path
        self.kept = tuple(kept)
        self._anew = anew
        self._count = len(kept)

    def append(self, found: Localization, images: Path | None = None) -> None:
        """Append one result. It is on the disk when this method returns.

        Args:
            found: the result.
            images: a folder with the prompt's images. It is moved to its place first, so that a result always has them.
        """
        place = ResultsFolder(self.path.parent).images_folder(self._count, found.prompt)
        if images is not None and images != place:
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            os.rename(images, place)
        line = json.dumps(found.to_dict(), allow_nan=False) + "\n"
        with self.path.open("w" if self._anew else "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._anew = False
        self._count += 1


def _mend_last_line(path: Path) -> None:
    """Repair a last line without a newline, which a killed process left: add the newline if the line is valid JSON, and
    delete the line otherwise."""
    with path.open("rb+") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        try:
            parse_json(content[start:])
        except NemoError:
            file.truncate(start)
        else:
            file.write(b"\n")


def read_results(path: str | os.PathLike[str]) -> list[Localization]:
    """Read the results in a folder, in the order in which they were found.

    Args:
        path: the folder, or its file results.jsonl.

    Raises:
        NemoError: the file does not exist, or a line of it is not a result.
    """
    path = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise NemoError(f"{path} does not exist: give the folder that `nemo-ext localize` wrote to")
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        with refusing(f"{path}, line {number},", "is not a result"):
            results.append(Localization.from_dict(parse_json(line)))
    return results
