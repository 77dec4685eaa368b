"""`nemo-ext threshold`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING

from nemo_ext.commands.shared import (
    PARTS_WRITTEN,
    PROMPT_LISTS,
    SEVERAL_PROCESSES,
    add_guidance,
    add_model,
    add_path,
    add_prompt_list,
    add_scoring,
    add_sscd,
    load_model,
    new_table,
    read_captions,
    show,
    whole_number,
)

if TYPE_CHECKING:
    from nemo_ext.measure.threshold import ImageThreshold, Threshold

NAME = "threshold"
SUMMARY = "measure the score above which a prompt counts as memorized"
DESCRIPTION = f"""\
Measure the score above which a prompt counts as memorized by this model. For each caption the first denoising
step is run from several seeds. If the noise differences of two seeds are similar, both of them lead to the same
image. A caption's score is the highest similarity of two seeds. The threshold is the mean plus one standard
deviation of the scores of ordinary captions. In the paper it is 0.428 for Stable Diffusion 1.4.

Then whole images of some captions are generated, and the same is measured on them. `nemo-ext localize` needs this
second threshold to verify that a memorized image no longer comes back.

reads   --model    a diffusers folder
        --prompts  a list of two or more captions that are not memorized
writes  --out      the threshold with all scores and settings, a JSON file; what is finished before that is in
                   OUT.parts, so that the same command continues if it was stopped

{PROMPT_LISTS}
{SEVERAL_PROCESSES}
example:
  nemo-ext threshold --model ./stable-diffusion-v1-4 --prompts captions.txt --limit 100 --out threshold.json
"""
WHEN_STOPPED = PARTS_WRITTEN
SHARED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompt_list(parser, "captions that are not memorized")
    add_path(parser, "--out", "the threshold (.json)")
    add_scoring(parser)
    images = parser.add_argument_group("images for the second threshold")
    images.add_argument(
        "--no-images", action="store_true", help="do not generate images; `nemo-ext localize` then needs --no-verify"
    )
    images.add_argument(
        "--image-prompts",
        type=whole_number(2),
        default=32,
        metavar="N",
        help="the number of captions whose images are compared, the first ones (default: 32)",
    )
    images.add_argument(
        "--image-seeds",
        type=whole_number(2),
        default=4,
        metavar="N",
        help="images per caption (default: 4)",
    )
    images.add_argument(
        "--steps", type=whole_number(1), default=25, metavar="N", help="denoising steps per image (default: 25)"
    )
    add_guidance(images, None, "what the pipeline has by default")
    add_sscd(images)


def run(args: argparse.Namespace) -> None:
    """Measure the captions' scores, compute the threshold from them, and write it."""
    from nemo_ext.files import check_output_file

    out = check_output_file(args.out, suffixes=(".json",))
    prompts = read_captions(args)
    from nemo_ext.measure.generation import Sampling
    from nemo_ext.measure.sscd import load_image_similarity

    similarity = load_image_similarity(args.sscd)
    pipe = load_model(args)
    from nemo_ext.measure.protocol import Protocol
    from nemo_ext.measure.threshold import memorization_threshold
    from nemo_ext.ranks.parts import parts_beside

    threshold = memorization_threshold(
        pipe,
        prompts,
        seeds=args.seeds,
        protocol=Protocol.from_name(args.protocol),
        batch_size=args.batch_size,
        sampling=None if args.no_images else Sampling(args.image_seeds, steps=args.steps, guidance=args.guidance),
        similarity=similarity,
        image_prompts=args.image_prompts,
        parts=parts_beside(out),
        ranks=args.ranks,
    )
    if not args.ranks.first:
        return
    threshold.save(out)
    shutil.rmtree(parts_beside(out))
    table = new_table("Memorization threshold", "what", "prompts", "seeds", "mean", "std", "highest", "τ")
    rows: list[tuple[str, Threshold | ImageThreshold, int]] = [("first step", threshold, threshold.seeds)]
    if threshold.images is not None:
        rows.append((f"images, {threshold.images.similarity}", threshold.images, threshold.images.sampling.seeds))
    for what, measured, seeds in rows:
        table.add_row(
            what,
            str(len(measured.scores)),
            str(seeds),
            f"{measured.mean:.3f}",
            f"{measured.std:.3f}",
            f"{max(measured.scores):.3f}",
            f"{measured.value:.3f}",
        )
    show(table, f"Written: {out}")
