"""The results folder: the one place that knows its files, how a result is added, and who may write.

    results.jsonl        a line for each prompt, a JSON object (`Localization.to_dict`), in the order of the searches
    neurons/NAME.json    the neurons of a memorized prompt
    images/NAME/         original.png, before-SEED.png and after-SEED.png, where somebody has generated images

NAME is `prompt_name`: the prompt's place in results.jsonl and a hash of its text. A result is appended in one piece as
soon as it is there, so each costs the same, however many there are. One process writes at a time; it holds a lock on
the folder, which ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_ext.errors import NemoError
from nemo_ext.results.record import Localization

RESULTS = "results.jsonl"
NEURONS = "neurons"
IMAGES = "images"
ORIGINAL = "original.png"


def prompt_name(index: int, prompt: str) -> str:
    """The name of a prompt's files: its place in results.jsonl, from 0, and a hash of its text.

    The text itself never becomes a path, because it may hold slashes, dots, or more characters than a name can.
    """
    return f"{index:04d}-{hashlib.sha256(prompt.encode('utf-8')).hexdigest()[:8]}"


def image_name(stage: str, seed: int) -> str:
    """The name of an image's file: `stage` is "before" or "after" the neurons were switched off."""
    return f"{stage}-{seed}.png"


class ResultsFolder:
    """A folder of results, which may not exist yet.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def results(self) -> Path:
        """The file of all results."""
        return self.path / RESULTS

    def neurons_file(self, index: int, prompt: str) -> Path:
        """The file of one prompt's neurons."""
        return self.path / NEURONS / f"{prompt_name(index, prompt)}.json"

    def images_folder(self, index: int, prompt: str) -> Path:
        """The folder of one prompt's images."""
        return self.path / IMAGES / prompt_name(index, prompt)

    def images(self, index: int, prompt: str, stage: str) -> dict[int, Path]:
        """One prompt's images that exist, "before" or "after": seed -> file, in the order of the seeds."""
        found = {}
        for file in self.images_folder(index, prompt).glob(f"{stage}-*.png"):
            if match := re.fullmatch(rf"{stage}-(\d+)", file.stem):
                found[int(match[1])] = file
        return dict(sorted(found.items()))

    def save_neurons(self, results: Sequence[Localization]) -> int:
        """Write the neurons of each memorized prompt to a file of its own, and return how many files there are.

        Args:
            results: all results of the folder, in the order of results.jsonl.
        """
        with_neurons = [(index, found) for index, found in enumerate(results) if len(found.neurons)]
        for index, found in with_neurons:
            found.neurons.save(self.neurons_file(index, found.prompt))
        return len(with_neurons)

    def read(self) -> list[Localization]:
        """All results, in the order of the file.

        Raises:
            NemoError: no such file, or a line that is not a result.
        """
        return read_results(self.results)

    @contextmanager
    def writing(self, *, anew: bool = False) -> Iterator[ResultsWriter]:
        """Lock the folder, mend what a killed process left, and give what appends to it.

        Args:
            anew: False: go on after the results that are there. True: the first new result replaces them.

        Raises:
            NemoError: another process writes to the folder, or a line is not a result.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # The folder itself is locked: a file for the lock would be left behind.
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NemoError(
                    f"another process writes results to {self.path}: wait until it has ended, or choose another folder"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):
                    raise
                # Some network file systems have no locks; there nothing keeps a second process out.
            kept: list[Localization] = []
            if not anew and self.results.exists():
                _mend_last_line(self.results)
                kept = self.read() if self.results.stat().st_size else []
            yield ResultsWriter(self.results, kept, anew)
        finally:
            os.close(folder)


class ResultsWriter:
    """Appends results to a folder that this process has locked.

    Attributes:
        path: the file.
        kept: the results that were there.
    """

    def __init__(self, path: Path, kept: Sequence[Localization], anew: bool) -> None:
        self.path = path
        self.kept = tuple(kept)
        self._anew = anew

    def append(self, found: Localization) -> None:
        """Add one result; when this returns, it is on the disk."""
        line = json.dumps(found.to_dict(), allow_nan=False) + "\n"
        with self.path.open("w" if self._anew else "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._anew = False


def _mend_last_line(path: Path) -> None:
    """A line without its end was being written when a process was killed: it is cut off, unless it is whole but for
    that."""
    with path.open("rb+") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


def read_results(path: str | os.PathLike[str]) -> list[Localization]:
    """The results of a folder, in the order in which they were found.

    Args:
        path: the folder, or the file in it.

    Raises:
        NemoError: no such file, or a line that is not a result.
    """
    path = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise NemoError(f"{path} does not exist: wanted a folder that localize wrote its results to")
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            results.append(Localization.from_dict(json.loads(line)))
        except (ValueError, NemoError) as error:
            raise NemoError(f"{path}, line {number}, is not a result: {error}") from error
    return results
