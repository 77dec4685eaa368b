"""`nemo-ext demo`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_ext.commands.shared import quiet_libraries

NAME = "demo"
SUMMARY = "the whole way on a bundled model, offline"
DESCRIPTION = """\
The whole way on a small bundled model that has memorized some images: statistics, threshold, localization,
images before and after, report. Offline, on the CPU, in about two minutes.

writes  --out DIR  results.jsonl, neurons/, images, a contact sheet and report.html

example:
  nemo-ext demo --out nemo-demo
"""
WHEN_STOPPED = "stopped; run the same command to start over"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nemo-demo"),
        metavar="DIR",
        help="folder of the results (default: nemo-demo)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo, which writes its files one after another and prints its own tables."""
    from nemo_ext.files import check_output_folder

    out = check_output_folder(args.out)
    quiet_libraries()
    from nemo_ext.demo import run as run_demo

    run_demo(out)
