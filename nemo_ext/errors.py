"""The one exception that the package raises on purpose."""


class NemoError(ValueError):
    """Something the caller can put right; the message says what, what was wanted and what came.

    The command line prints the message alone and exits with 1. Anything else that escapes from the
    package is a bug.
    """
