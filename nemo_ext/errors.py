"""The exception for mistakes that the caller can correct, and the warning for what the caller should know."""

import contextlib
import sys
import warnings
from pathlib import Path

# Frames in these files are not the caller's. A function can be decorated with a context manager.
_PACKAGE = str(Path(__file__).parent)
_BETWEEN = (_PACKAGE, contextlib.__file__)


class NemoError(ValueError):
    """An error that the caller can correct. Its message says what is wrong, what was expected and what was received.

    The command line prints the message without a traceback and exits with code 1. Any other exception that leaves the
    package is a bug, except for the errors that `nemo_ext.ops` documents.
    """


class NemoWarning(UserWarning):
    """Something that the caller should know, although the call goes on. The command line prints it as a sentence."""


def reason(error: BaseException) -> str:
    """An exception as a sentence. For an unexpected one it begins with the exception's type."""
    if isinstance(error, NemoError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{type(error).__name__}: {str(error) or 'no message'}"


def warn(message: str) -> None:
    """Give a `NemoWarning` that points to the line outside of this package from which it was called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NemoWarning, stacklevel=level)
