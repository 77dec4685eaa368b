"""`nemo-ext threshold`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse

from nemo_ext.commands.shared import (
    NOTHING_WRITTEN,
    add_model,
    add_path,
    add_scoring,
    load_model,
    new_table,
    read_captions,
    show,
)

NAME = "threshold"
SUMMARY = "measure the score above which a prompt counts as memorized"
DESCRIPTION = """\
Measure the score above which a prompt counts as memorized by this model. For each caption the first denoising
step is run from several seeds. If the noise differences of two seeds are similar, both of them lead to the same
image. A caption's score is the highest similarity of two seeds. The threshold is the mean plus one standard
deviation of the scores of ordinary captions. In the paper it is 0.428 for Stable Diffusion 1.4.

reads   --model    a diffusers folder
        --prompts  a UTF-8 text file with two or more captions that are not memorized, one per line
writes  --out      the threshold with all scores and settings, a JSON file

example:
  nemo-ext threshold --model ./stable-diffusion-v1-4 --prompts captions.txt --out threshold.json
"""
WHEN_STOPPED = NOTHING_WRITTEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_path(parser, "--prompts", "a text file with captions that are not memorized, one per line")
    add_path(parser, "--out", "the threshold (.json)")
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    """Measure the captions' scores, compute the threshold from them, and write it."""
    from nemo_ext.files import check_output_file

    out = check_output_file(args.out, suffixes=(".json",))
    prompts = read_captions(args.prompts)
    pipe = load_model(args)
    from nemo_ext.measure.protocol import Protocol
    from nemo_ext.measure.threshold import memorization_threshold

    threshold = memorization_threshold(
        pipe,
        prompts,
        seeds=args.seeds,
        protocol=Protocol.from_name(args.protocol),
        batch_size=args.batch_size,
    )
    threshold.save(out)
    table = new_table("Memorization threshold", "prompts", "seeds", "mean", "std", "highest", "τ")
    table.add_row(
        str(len(threshold.scores)),
        str(threshold.seeds),
        f"{threshold.mean:.3f}",
        f"{threshold.std:.3f}",
        f"{max(threshold.scores):.3f}",
        f"{threshold.value:.3f}",
    )
    show(table, f"Written: {out}")
