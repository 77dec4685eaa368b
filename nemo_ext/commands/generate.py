"""`nemo-ext generate`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.commands.shared import (
    NOTHING_WRITTEN,
    add_batch_size,
    add_model,
    add_path,
    load_model,
    new_table,
    plain,
    show,
    visible_text,
    whole_number,
)

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "generate"
SUMMARY = "images with neurons off, beside before"
DESCRIPTION = """\
Generate images of one prompt, the same seeds with and without the given neurons.

reads   --model    a diffusers folder
        --neurons  a file from DIR/neurons of `nemo-ext localize` (.json or .safetensors); without it,
                   only the untouched model is shown
writes  --out DIR  DIR/before-SEED.png, DIR/after-SEED.png, DIR/contact-sheet.png, and DIR/generation.json
                   with prompt, seeds, neurons, steps and guidance

`nemo-ext report --results DIR` shows images that lie in DIR/images/NNNN-HASH, named as in DIR/neurons.

example:
  nemo-ext generate --model ./stable-diffusion-v1-4 --prompt "The No Limits Business Woman Podcast" \\
      --neurons results/neurons/0000-1b2c3d4e.json --seeds 4 --out results/images/0000-1b2c3d4e
"""
WHEN_STOPPED = NOTHING_WRITTEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", type=visible_text, required=True, metavar="TEXT", help="the prompt")
    parser.add_argument("--neurons", type=Path, metavar="FILE", help="the neurons to switch off")
    parser.add_argument("--seeds", type=whole_number(1), default=4, metavar="N", help="images per row (default: 4)")
    parser.add_argument(
        "--first-seed",
        type=whole_number(0),
        default=1,
        metavar="SEED",
        help="seed of the first image, the others count up from it (default: 1)",
    )
    parser.add_argument("--steps", type=whole_number(1), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument(
        "--guidance",
        type=_guidance,
        default=7.0,
        metavar="X",
        help="classifier-free guidance (default: 7, as in the paper)",
    )
    add_path(parser, "--out", "folder of the images", metavar="DIR")
    add_batch_size(parser, 4, "images generated at once")


def run(args: argparse.Namespace) -> None:
    """Generate the images of all seeds, with the neurons on and then off, and write them with their settings."""
    from nemo_ext.files import check_input_file, check_output_folder

    out = check_output_folder(args.out)
    if args.neurons is not None:
        check_input_file(args.neurons, "neurons", "`nemo-ext localize`")
    from nemo_ext.evaluate.generate import generate_images
    from nemo_ext.neurons import NeuronSet
    from nemo_ext.patching.patch import patched
    from nemo_ext.report.images import contact_sheet
    from nemo_ext.results.folder import image_name

    neurons = None if args.neurons is None else NeuronSet.load(args.neurons)
    pipe = load_model(args)
    if neurons is not None:
        neurons.check(pipe)
    seeds = range(args.first_seed, args.first_seed + args.seeds)

    def images() -> list[Image]:
        prompts = [args.prompt] * len(seeds)
        return generate_images(
            pipe, prompts, seeds, steps=args.steps, guidance=args.guidance, batch_size=args.batch_size
        )

    rows = {"before": images()}
    if neurons is not None:
        with patched(pipe, neurons):
            rows["after"] = images()
    sheet = contact_sheet(
        [(f"{stage}: {args.prompt}", row) for stage, row in rows.items()],
        columns=[f"seed {seed}" for seed in seeds],
        size=min(256, rows["before"][0].width),
    )
    description = {
        "prompt": args.prompt,
        "seeds": list(seeds),
        "neurons": None if neurons is None else neurons.to_dict(),
        "steps": args.steps,
        "guidance": args.guidance,
        "model": str(args.model),
        "dtype": args.dtype,
        "scheduler": type(pipe.scheduler).__name__,
    }
    files = {
        image_name(stage, seed): image for stage, row in rows.items() for seed, image in zip(seeds, row, strict=True)
    }
    # Nothing is written before everything is in memory, so that an interrupted generation leaves nothing behind.
    _write(out, {**files, "contact-sheet.png": sheet}, description)
    table = new_table(plain(args.prompt), "images", "neurons off", "files")
    for stage, row in rows.items():
        off = str(len(neurons)) if neurons is not None and stage == "after" else "0"
        table.add_row(f"{stage} ({len(row)})", off, f"{stage}-SEED.png")
    show(table, f"Written: {out} (look at {out / 'contact-sheet.png'})")


def _guidance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return number


def _write(out: Path, images: Mapping[str, Image], description: Mapping[str, Any]) -> None:
    """Write the images under their names, and how they were made as generation.json."""
    from nemo_ext.files import replacing

    for name, image in images.items():
        with replacing(out / name) as temporary:
            image.save(temporary, format="PNG", optimize=True)
    with replacing(out / "generation.json") as temporary:
        text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
