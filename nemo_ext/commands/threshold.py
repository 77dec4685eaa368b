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
SUMMARY = "above which score a prompt counts as memorized"
DESCRIPTION = """\
Compute the score above which a prompt counts as memorized on this model. Per caption, the first denoising
step is run from several seeds; where the noise differences of two seeds are alike, the caption pulls the
image to one place. The threshold is the mean plus one standard deviation, over ordinary captions, of each
one's highest similarity. (0.428 is the paper's for Stable Diffusion 1.4.)

reads   --model    a diffusers folder
        --prompts  a UTF-8 text file of captions that aren't memorized, one a line, two or more
writes  --out      the threshold with all scores and settings, JSON

example:
  nemo-ext threshold --model ./stable-diffusion-v1-4 --prompts captions.txt --out threshold.json
"""
WHEN_STOPPED = NOTHING_WRITTEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_path(parser, "--prompts", "captions that aren't memorized, one a line")
    add_path(parser, "--out", "the threshold (.json)")
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    """Score the captions and compute the threshold from their scores."""
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
