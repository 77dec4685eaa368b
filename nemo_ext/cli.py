"""The `nemo-ext` command line: the parser, built from the commands of `nemo_ext/commands/`, and the exit codes.

Every command checks all that it was given before it starts to work, says what is wrong in one sentence on
stderr, and leaves no half-written file. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nemo_ext import __version__
from nemo_ext.commands import COMMANDS
from nemo_ext.commands.shared import plain
from nemo_ext.errors import NemoError

DESCRIPTION = """\
Find the neurons that make a text-to-image diffusion model replicate a training image, and switch them off.

The order of work, on a diffusers folder of a Stable Diffusion 1.x or 2.x model:

  1. nemo-ext stats      how the neurons react to ordinary captions      -> stats.safetensors
  2. nemo-ext threshold  above which score a prompt counts as memorized  -> threshold.json
  3. nemo-ext localize   which neurons carry a prompt's training image   -> results/
  4. nemo-ext generate   images with these neurons off, beside before    -> images/
  5. nemo-ext report     all of it on one HTML page                      -> report.html

`nemo-ext demo` goes the whole way on a small bundled model, offline. Steps 1 and 2 are done once per model.
"""

EPILOG = """\
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
`nemo-ext COMMAND --help` says what a command reads and writes, with an example.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all other errors of `nemo-ext` are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses holds the chosen command's `run` and `when_stopped`."""
    parser = _Parser(
        prog="nemo-ext",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"nemo-ext {__version__}", help="show the version and exit"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command.run, when_stopped=command.WHEN_STOPPED)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `nemo-ext` command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 0
    try:
        with warnings.catch_warnings():
            _tell_own_warnings(args)
            args.run(args)
    except KeyboardInterrupt:
        _complain(args, args.when_stopped.format(**vars(args)))
        return 130
    except Exception as error:
        if args.debug:
            raise
        _complain(args, _reason(error))
        return 1
    return 0


def _reason(error: Exception) -> str:
    """What went wrong, for the user; an error that nobody expected is named with its type."""
    if isinstance(error, NemoError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{type(error).__name__}: {str(error) or 'no message'}; run again with --debug for the traceback"


def _tell_own_warnings(args: argparse.Namespace) -> None:
    """Show the package's own warnings as sentences, and no other library's."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _complain(args, f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module="nemo_ext")
    warnings.showwarning = show


def _complain(args: argparse.Namespace, message: str) -> None:
    print(f"nemo-ext {args.command}: {plain(message)}", file=sys.stderr)
