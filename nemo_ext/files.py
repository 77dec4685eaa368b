"""The user's files: atomic writes, reading prompts, and checks of paths before a long computation starts."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError
from nemo_ext.prompts import read_prompt_list

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file atomically: the block writes a temporary file, which then replaces `path`.

    If the block raises an exception, `path` stays unchanged and the temporary file is deleted. The file has the
    permissions of any new file, whatever the library that writes it does: safetensors makes files that only their owner
    can read.

    Args:
        path: the file; its folder is created if it is missing.

    Yields:
        The path of the temporary file, which is empty, in the same folder as `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Lock a folder for the length of the block. The operating system releases the lock when the process ends.

    Args:
        folder: the folder, which exists. It is locked itself, because a lock file would remain after the process.
        busy: the message if another process has locked it.

    Raises:
        NemoError: another process has locked the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NemoError(busy) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):
                raise
            # Some network file systems do not support locks. There, a second process is not detected.
        yield
    finally:
        os.close(descriptor)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read the texts of a list of prompts: a text file, CSV or JSON lines, as for `nemo_ext.prompts.read_prompt_list`.

    Args:
        path: the file.

    Returns:
        The prompts, in the order of the file.

    Raises:
        NemoError: as for `read_prompt_list`.
    """
    return [prompt.text for prompt in read_prompt_list(path)]


# Held while a global setting of Pillow is changed, so that two threads do not restore each other's.
_pillow_settings = threading.Lock()


def read_image(path: str | Path) -> Image:
    """Read an image file as RGB.

    Raises:
        NemoError: the file cannot be read as an image, or is cut off.
    """
    from PIL import Image as images
    from PIL import ImageFile

    with _pillow_settings:
        # Programs around this one set it, and then Pillow fills what is missing of an image with gray.
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            with images.open(path) as picture:
                converted: Image = picture.convert("RGB")
                return converted
        except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
            raise NemoError(f"the image {path} can't be read: {error}") from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def check_input_file(path: str | Path, what: str, source: str) -> Path:
    """Check that `path` is a file that can be read.

    Args:
        path: the file.
        what: what the file should contain; for the message.
        source: the command that writes such a file; for the message.

    Returns:
        `path` as a `Path`.

    Raises:
        NemoError: there is no such file, or this user has no permission to read it.
    """
    path = Path(path)
    if not path.is_file():
        raise NemoError(f"there is no file {path} to read {what} from: {source} writes one")
    if not os.access(path, os.R_OK):
        raise NemoError(f"no permission to read {what} from {path}")
    return path


def check_output_file(path: str | Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Check that a file can be written at `path`, so that a long computation does not fail at its end.

    Nothing is created or changed. The folder of the file may be missing.

    Args:
        path: the file that will be written.
        suffixes: the allowed endings, such as `(".json",)`; an empty tuple allows every ending.

    Returns:
        `path` as a `Path`.

    Raises:
        NemoError: `path` is a folder, its ending is not allowed, or its folder cannot be written to.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise NemoError(f"{path} should end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise NemoError(f"{path} is a folder: give the name of a file")
    check_output_folder(path.parent)
    return path


def check_output_folder(path: str | Path) -> Path:
    """Check that files can be written into the folder `path`, which does not have to exist.

    Nothing is created or changed.

    Args:
        path: the folder.

    Returns:
        `path` as a `Path`.

    Raises:
        NemoError: `path` or one of its parents is a file, or this user has no permission to write there.
    """
    path = Path(path)
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NemoError(f"{path} can't be written to, because {nearest} is a file: give the name of a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise NemoError(f"{path} can't be written to: no permission to write in {nearest}")
    return path
