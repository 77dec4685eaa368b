"""The user's disk: writing files whole or not at all, reading prompts, and checks before the work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_ext.errors import NemoError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and move it to `path` when all went well.

    The folder is made if it is missing. After an exception `path` is as it was and the temporary
    file is gone.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a UTF-8 text file, one a line; blank lines are skipped, nothing else is special.

    Raises:
        NemoError: The file is missing, can't be read, isn't UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise NemoError(f"the prompt file {path} doesn't exist: write one prompt a line") from error
    except UnicodeDecodeError as error:
        raise NemoError(
            f"the prompt file {path} isn't UTF-8 text (byte {error.start}): save it as UTF-8, one prompt a line"
        ) from error
    except OSError as error:
        raise NemoError(f"the prompt file {path} can't be read: {error.strerror or error}") from error
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise NemoError(f"the prompt file {path} is empty: write one prompt a line")
    return prompts


def check_input_file(path: str | Path, what: str, source: str) -> Path:
    """Make sure that there is a file to read at `path`.

    Args:
        path: The file.
        what: What it should hold, for the message.
        source: Where such a file comes from, for the message.

    Raises:
        NemoError: There is none, or it can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise NemoError(f"there is no file {path} to read {what} from: {source} writes one")
    if not os.access(path, os.R_OK):
        raise NemoError(f"no permission to read {what} from {path}")
    return path


def check_output_file(path: str | Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Make sure that a file can be written at `path`, before hours of work go into it.

    Args:
        path: The file to be written later; nothing is touched, and missing folders are no hindrance.
        suffixes: Allowed endings, such as `(".json",)`; empty allows all.

    Raises:
        NemoError: `path` is a folder, its ending is wrong, or its folder can't be written to.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise NemoError(f"{path} should end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise NemoError(f"{path} is a folder: give the name of a file")
    check_output_folder(path.parent)
    return path


def check_output_folder(path: str | Path) -> Path:
    """Make sure that files can be written into the folder `path`, which may not exist yet.

    Raises:
        NemoError: `path` or one of its parents is a file, or can't be written to.
    """
    path = Path(path)
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NemoError(f"{path} can't be written to, {nearest} is a file: give the name of a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise NemoError(f"{path} can't be written to: no permission to write in {nearest}")
    return path
