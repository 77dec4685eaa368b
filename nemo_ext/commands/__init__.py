"""The commands of `nemo-ext`: one file for each, and `shared.py` for what several of them need.

A command's file holds its help, its arguments and what it does, under the names that `Command` lists. To add one, write
its file and put it into `COMMANDS`; `nemo_ext/cli.py` builds the parser from there.

torch, diffusers and matplotlib take seconds to import, and `nemo-ext --help` must not wait for them. So the files of
this folder import at the top only what is light, and everything else inside the functions that use it.
"""

from __future__ import annotations

import argparse
import typing

from nemo_ext.commands import demo, generate, info, localize, report, stats, threshold


class Command(typing.Protocol):
    """What each command's file defines at its top level; the file as a module is the command."""

    #: The word after `nemo-ext`, which is also the file's name.
    NAME: str
    #: What the command gives, as a phrase for the list in `nemo-ext --help`.
    SUMMARY: str
    #: The text of `nemo-ext NAME --help`: what the command does, reads and writes, and an example.
    DESCRIPTION: str
    #: What the user reads after Ctrl-C. `{out}` stands for the argument `--out`, and so for every other.
    WHEN_STOPPED: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments; each of them has a help text."""

    def run(self, args: argparse.Namespace) -> None:
        """Check all that was given, then do the work, then write the results and show what was written.

        Raises:
            NemoError: something that the user can put right.
        """


#: All commands, in the order of `nemo-ext --help`, which is the order of work.
COMMANDS: tuple[Command, ...] = (stats, threshold, localize, generate, report, demo, info)
