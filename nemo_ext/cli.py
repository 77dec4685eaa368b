"""The `nemo-ext` command line: the parser, which is built from the commands in `nemo_ext/commands/`, and exit codes.

Every command checks its arguments before it starts a long computation, reports an error as one sentence on stderr, and
writes files atomically. Exit codes: 0 success, 1 error, 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import signal
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nemo_ext import __version__
from nemo_ext.commands import COMMANDS
from nemo_ext.commands.shared import plain
from nemo_ext.errors import NemoError, NemoWarning, reason
from nemo_ext.ranks.ranks import Ranks

DESCRIPTION = """\
Find the neurons that make a text-to-image diffusion model replicate a training image, and switch them off.

These are the steps for a diffusers folder of a Stable Diffusion 1.x or 2.x model. Steps 1 and 2 are needed only
once per model:

  1. nemo-ext stats      measure how each neuron reacts to ordinary captions  -> stats.safetensors
  2. nemo-ext threshold  measure the threshold for memorized prompts          -> threshold.json
  3. nemo-ext localize   find the neurons that carry a prompt's image         -> results/
  4. nemo-ext generate   generate images with these neurons on and off        -> images/
  5. nemo-ext evaluate   measure on images what these neurons do              -> results/evaluation.json
  6. nemo-ext neurons    compare and combine the neurons of several prompts   -> union.json
  7. nemo-ext bake       switch these neurons off for good, in a copy         -> a diffusers folder
  8. nemo-ext report     show all results on one HTML page                    -> report.html

`nemo-ext demo` runs all steps on a small bundled model, offline.
"""

EPILOG = """\
Exit codes: 0 success, 1 error, 2 wrong usage, 130 stopped with Ctrl-C.
`nemo-ext COMMAND --help` describes what a command reads and writes, and gives an example.
"""


# What is printed for characters that the encoding of the output lacks. Other letters lose their accents.
_SPELLED = {"τ": "tau", "θ": "theta", "σ": "sigma", "μ": "mu", "δ": "delta", "→": "->", "±": "+/-", "×": "x"}
_SPELLED |= {"–": "-", "−": "-", "·": "-", "≥": ">=", "≤": "<=", "“": '"', "”": '"', "‘": "'", "’": "'"}


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error as one sentence, as `nemo-ext` does for all other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. Its result has the chosen command's `run` and `WHEN_STOPPED` as `run` and `when_stopped`."""
    parser = _Parser(
        prog="nemo-ext",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"nemo-ext {__version__}", help="print the version and exit"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command.run, when_stopped=command.WHEN_STOPPED, shared=command.SHARED, ranks=Ranks())
        subparser.add_argument("--debug", action="store_true", help="print the traceback if there is an error")
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `nemo-ext` command line.

    Args:
        argv: the arguments after the program's name; None: the arguments of the process.

    Returns:
        The exit code: 0 success, 1 error, 2 wrong usage, 130 stopped with Ctrl-C.
    """
    _print_every_character()
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 0
    try:
        # Where the home folder cannot be written to, matplotlib reports where it keeps its fonts instead.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        with warnings.catch_warnings(), _ranks(args) as ranks:
            _print_own_warnings(args)
            if ranks.count > 1 and not args.shared:
                raise NemoError("this command has one process: start it without torchrun")
            args.run(args)
    except KeyboardInterrupt:
        _print_message(args, args.when_stopped.format(**vars(args)))
        return 130
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (NemoError, OSError))
        hint = "" if expected else "; run again with --debug for the traceback"
        _print_message(args, reason(error) + hint)
        return 1
    finally:
        args.ranks.leave()
    return 0


def _ranks(args: argparse.Namespace) -> Ranks:
    """Make `args.ranks`, the ranks that torchrun has started or a single one. Only rank 0 speaks to the user."""
    args.ranks = ranks = Ranks.of_torchrun()
    if ranks.count > 1:
        # torchrun ends the other ranks in this way if one is killed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it is open as long as the process
        if not args.debug:
            sys.stderr = sys.stdout
    return ranks


def _print_every_character() -> None:
    """Let stdout and stderr replace what their encoding lacks, instead of raising an error.

    The encoding is ASCII, Latin-1 or another small one in some batch systems, and where a pipe is redirected.
    """
    codecs.register_error("nemo_ext.spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nemo_ext.spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell the characters that could not be encoded in ASCII; the signature is that of `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(character) or _without_accents(character) for character in characters), error.end


def _without_accents(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def _print_own_warnings(args: argparse.Namespace) -> None:
    """Print warnings of this package as sentences, and hide warnings of other libraries."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _print_message(args, f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=NemoWarning)
    warnings.showwarning = show


def _print_message(args: argparse.Namespace, message: str) -> None:
    print(f"nemo-ext {args.command}: {plain(message)}", file=sys.stderr)
