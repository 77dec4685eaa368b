"""`nemo-ext info`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ext.commands.shared import NOTHING_WRITTEN, new_table, show
from nemo_ext.errors import NemoError

NAME = "info"
SUMMARY = "show versions, the build, and what was found on this machine"
DESCRIPTION = """\
Show versions, how the extension was built, and what it finds on this machine. Please copy the output into bug
reports.

example:
  nemo-ext info
"""
WHEN_STOPPED = NOTHING_WRITTEN
SHARED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the facts as JSON, for programs")


def run(args: argparse.Namespace) -> None:
    """Print all facts. If the extension cannot be loaded, print the facts that are known, and then raise an error."""
    from nemo_ext.info import collect

    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        table = new_table("nemo_ext", "what", "value")
        for name, value in _flat(facts):
            table.add_row(name, value)
        show(table)
    if "error" in facts:
        raise NemoError(f"the extension doesn't work here: {facts['error']}")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested facts into rows: the fact `torch` in `packages` gets the name `packages torch`."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + name, text
