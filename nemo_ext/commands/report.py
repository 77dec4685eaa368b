"""`nemo-ext report`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse

from nemo_ext.commands.shared import NOTHING_WRITTEN, add_path, results_table, show, visible_text

NAME = "report"
SUMMARY = "show all results on one HTML page"
DESCRIPTION = """\
Show the results of a search on one HTML page: the verdict on each prompt, its scores and images before and
after, the trials of the search, neurons per layer, and certificates. The page contains all plots and images, and
needs no JavaScript.

reads   --results DIR  DIR/results.jsonl, which `nemo-ext localize` wrote; and original.png, before-SEED.png and
                       after-SEED.png in DIR/images/NNNN-HASH/, if they exist; and the tables of an evaluation,
                       if `nemo-ext evaluate` has written some
writes  --out          one HTML file

example:
  nemo-ext report --results results --out report.html
"""
WHEN_STOPPED = NOTHING_WRITTEN
SHARED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "--results", "the folder that `nemo-ext localize` wrote to", metavar="DIR")
    add_path(parser, "--out", "the page (.html)")
    parser.add_argument("--title", type=visible_text, default="NeMo report", help="the page's title")


def run(args: argparse.Namespace) -> None:
    """Read the results and their images, and write the page."""
    from nemo_ext.files import check_output_file

    out = check_output_file(args.out, suffixes=(".html", ".htm"))
    from nemo_ext.report.page import find_images, write_report
    from nemo_ext.report.tables import evaluation_tables
    from nemo_ext.results.folder import read_results

    results = read_results(args.results)
    write_report(
        out,
        results,
        images=find_images(args.results, results),
        title=args.title,
        tables=evaluation_tables(args.results),
    )
    show(results_table(results), f"Written: {out}")
