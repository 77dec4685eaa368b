"""The results folder: the one place that knows its files, how a result is added, and who may write.

`results.jsonl` has a line for each prompt, a JSON object (`Localization.to_dict`), in the order in which they were
found. A result is appended in one piece as soon as it is there, so that each costs the same, however many there are.
One process writes at a time; it holds a lock on the folder, which ends with the process, however that ends.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_ext.errors import NemoError
from nemo_ext.results.record import Localization

RESULTS = "results.jsonl"


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

    def read(self) -> list[Localization]:
        """All results, in the order of the file.

        Raises:
            NemoError: no such file, or a line that is not a result.
        """
        return read_results(self.results)

    @contextmanager
    def writing(self, *, anew: bool = False) -> Iterator["ResultsWriter"]:
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
