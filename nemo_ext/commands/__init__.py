"""The commands of `nemo-ext`: each has a file of its own, and `shared.py` has the code that several commands need.

A command's file defines its help, its arguments and its work, under the names that `Command` lists. To add a command,
write its file and add it to `COMMANDS`, from which `nemo_ext/cli.py` builds the parser.

torch, diffusers and matplotlib take seconds to import, and `nemo-ext --help` must not wait for them. So the files in
this folder import only light modules at the top, and all other modules inside the functions that use them.
"""

from __future__ import annotations

import argparse
import typing

from nemo_ext.commands import bake, demo, evaluate, generate, info, localize, neurons, report, stats, threshold


class Command(typing.Protocol):
    """The interface of a command. A command is a module that defines these names at its top level."""

    #: The word after `nemo-ext`, which is also the file's name.
    NAME: str
    #: What the command does, as an imperative phrase, for the list in `nemo-ext --help`.
    SUMMARY: str
    #: The text of `nemo-ext NAME --help`: what the command does, reads and writes, and an example.
    DESCRIPTION: str
    #: The message after Ctrl-C. `{out}` is replaced by the argument `--out`, and so are the names of other arguments.
    WHEN_STOPPED: str

    #: Whether the processes that torchrun has started can share the command's work. They are `args.ranks` in `run`.
    SHARED: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser, each of them with a help text."""

    def run(self, args: argparse.Namespace) -> None:
        """Check the arguments, do the work, write the results, and print a summary of what was written.

        Raises:
            NemoError: there is an error that the user can correct.
        """


#: All commands in the order of `nemo-ext --help`, which is the order in which they are used.
COMMANDS: tuple[Command, ...] = (stats, threshold, localize, generate, evaluate, neurons, bake, report, demo, info)
