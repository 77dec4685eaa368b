"""The exception that the package raises for mistakes that the caller can correct."""


class NemoError(ValueError):
    """An error that the caller can correct. Its message says what is wrong, what was expected and what was received.

    The command line prints the message without a traceback and exits with code 1. Any other exception that leaves the
    package is a bug, except for the errors that `nemo_ext.ops` documents.
    """
