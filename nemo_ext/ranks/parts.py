"""The finished parts of a job that is not complete yet: one file for each, so that a killed job continues where it was.

Several ranks may write parts at the same time. A file is written to a temporary name and renamed, so a part is there
completely or not at all, and a part that two processes have done is the same twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

import nemo_ext
from nemo_ext.errors import NemoError
from nemo_ext.files import locked, replacing
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.reading import parse_json, refusing

_Value = TypeVar("_Value")

_SETTINGS = "settings.json"
# A network file system shows the files of other machines late. So long is waited for them.
_SHOWN_AFTER = 120.0


def digest_of(texts: Sequence[str]) -> str:
    """SHA-256 of several texts in their order, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


@contextmanager
def open_parts(
    path: str | os.PathLike[str] | None, settings: Mapping[str, Any], ranks: Ranks
) -> Iterator[Parts | None]:
    """Open a folder of parts for the length of the block, or none if `path` is None; arguments as for `Parts`.

    Raises:
        NemoError: there is no path and there are several ranks, or as for `Parts.open`.
    """
    if path is None:
        if ranks.count > 1:
            raise NemoError("several ranks meet in a folder: give one with parts=")
        yield None
        return
    parts = Parts(path, settings)
    with parts.open(ranks):
        yield parts


def measure_each(
    count: int,
    name: str,
    measure: Callable[[int], _Value],
    kind: type[_Value],
    parts: Parts | None,
    ranks: Ranks,
    done: Callable[[int], None],
) -> list[_Value]:
    """Measure something on each of `count` prompts, each of which is one part.

    Args:
        count: the number of prompts.
        name: what is measured, for the names of the files.
        measure: measures the prompt with an index, and returns what JSON can hold.
        kind: the type of what it returns, a float or a dictionary.
        parts: the open folder; None: nothing is kept.
        ranks, done: as for `Parts.do`.

    Returns:
        What `measure` has returned, in the order of the prompts.
    """
    if parts is None:
        return [measure(place) for place in ranks.units(range(count), done)]
    folder = parts
    files = folder.do(
        [f"{name}-{place:06d}.json" for place in range(count)],
        lambda place, file: folder.write(file.name, measure(place)),
        ranks,
        done,
    )
    measured = []
    for file in files:
        value = folder.read(file.name)
        if not isinstance(value, kind):
            raise NemoError(f"{file} is not a finished part: delete it, so that it is measured again")
        measured.append(value)
    ranks.meet()  # before one of them deletes the files
    return measured


def parts_beside(out: str | os.PathLike[str]) -> Path:
    """The folder for the parts of a job whose result is one file: OUT.parts."""
    return Path(f"{os.fspath(out)}.parts")


class Parts:
    """A folder of finished parts. It does not have to exist.

    Args:
        path: the folder.
        settings: everything that a part depends on, as JSON can hold it; parts of other settings are refused.
        advice: what the user can do if there are parts of other settings, for the message.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], advice: str = "") -> None:
        self.path = Path(path)
        self._settings = json.loads(json.dumps(dict(settings)))
        self._advice = advice or f"choose another file, or delete {self.path}"

    @contextmanager
    def open(self, ranks: Ranks) -> Iterator[None]:
        """Make the folder, and lock it for the length of the block.

        Args:
            ranks: the ranks that share the job. All of them enter the block.

        Raises:
            NemoError: the folder has parts of other settings, another job uses it, or a rank has other settings or
                versions, or does not see the folder.
        """
        ranks.agree(
            {
                "version of nemo_ext": nemo_ext.__version__,
                "version of torch": torch.__version__,
                **{name: json.dumps(value) for name, value in self._settings.items()},
            }
        )
        with ExitStack() as stack:
            mark = ranks.from_first(lambda: self._make(stack))
            if not self.file(mark).exists():
                raise NemoError(
                    f"{self.path} is not the folder that rank 0 sees under this name: all ranks need one file system"
                )
            ranks.meet()
            if ranks.first:
                self.file(mark).unlink()
            yield

    def _make(self, stack: ExitStack) -> str:
        self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(self.path, f"another process writes to {self.path}: wait until it has ended"))
        file = self.file(_SETTINGS)
        if file.exists():
            with refusing(file, "does not hold settings"):
                there = parse_json(file.read_bytes())
                if not isinstance(there, dict):
                    raise NemoError(f"wanted a JSON object, got {type(there).__name__}")
            for name, now in self._settings.items():
                if there.get(name) != now:
                    raise NemoError(
                        f"{self.path} has the finished parts of an earlier run with another {name}: "
                        f"{there.get(name)}, now {now}; {self._advice}"
                    )
        else:
            self.write(_SETTINGS, self._settings)
        # Killed processes leave temporary files.
        for left in self.path.glob(".*"):
            left.unlink(missing_ok=True)
        mark = f".{secrets.token_hex(8)}.seen"
        self.file(mark).touch()
        return mark

    def do(
        self, names: Sequence[str], make: Callable[[int, Path], None], ranks: Ranks, done: Callable[[int], None]
    ) -> list[Path]:
        """Let the ranks make all parts that do not exist, wait until all of them do, and return their files in order.

        Args:
            names: the names of the parts, which have letters, digits, dots and hyphens only.
            make: makes the part with an index, and writes it to a file atomically.
            ranks: the ranks. All of them make this call, and get the same files.
            done: called with the number of parts that are there, as for `Ranks.units`.

        Raises:
            NemoError: a rank is lost, or its files do not appear here.
        """
        files = [self.file(name) for name in names]
        todo = ranks.from_first(lambda: [index for index, file in enumerate(files) if not file.exists()])
        if ranks.first:
            done(len(files) - len(todo))
        for index in ranks.units(todo, done):
            make(index, files[index])
        self.await_files(lambda: sum(not file.exists() for file in files))
        return files

    def await_files(self, missing: Callable[[], int]) -> None:
        """Wait until the parts of all ranks appear in the folder.

        Args:
            missing: looks for them, and returns how many are missing.

        Raises:
            NemoError: some are still missing after two minutes.
        """
        started = time.monotonic()
        while number := missing():
            if time.monotonic() - started > _SHOWN_AFTER:
                raise NemoError(
                    f"{number} parts of other ranks do not appear in {self.path}: all ranks need one file system; "
                    "start again to continue"
                )
            time.sleep(0.5)

    def file(self, name: str) -> Path:
        """The file of the part `name`."""
        return self.path / name

    def write(self, name: str, value: Any) -> None:
        """Write a part that JSON can hold. It is on the disk when this method returns."""
        with replacing(self.file(name)) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> Any:
        """Read a part that `write` has written.

        Raises:
            NemoError: the file cannot be read, or is not JSON.
        """
        with refusing(self.file(name), "is not a finished part"):
            return parse_json(self.file(name).read_bytes())

    def remove(self) -> None:
        """Delete the folder, after everything in it has become part of the result."""
        shutil.rmtree(self.path, ignore_errors=True)
