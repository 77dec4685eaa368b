"""`nemo-ext generate`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.commands.shared import (
    NOTHING_WRITTEN,
    add_batch_size,
    add_guidance,
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
SUMMARY = "generate images with neurons on and off, to compare them"
DESCRIPTION = """\
Generate images of one prompt with the same seeds twice: before and after a set of neurons is switched off.

reads   --model    a diffusers folder
        --neurons  a set of neurons (.json or .safetensors), such as a file in DIR/neurons that
                   `nemo-ext localize` wrote; without it, only the untouched model generates images
writes  --out DIR  DIR/before-SEED.png, DIR/after-SEED.png, DIR/contact-sheet.png, and DIR/generation.json
                   with the prompt, seeds, neurons, steps and guidance

`nemo-ext report --results DIR` shows the images in DIR/images/NNNN-HASH, where NNNN-HASH is the name of the
prompt's file in DIR/neurons.

example:
  nemo-ext generate --model ./stable-diffusion-v1-4 --prompt "The No Limits Business Woman Podcast" \\
      --neurons results/neurons/0000-1b2c3d4e.json --seeds 4 --out results/images/0000-1b2c3d4e
"""
WHEN_STOPPED = NOTHING_WRITTEN
SHARED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", type=visible_text, required=True, metavar="TEXT", help="the prompt")
    parser.add_argument("--neurons", type=Path, metavar="FILE", help="the neurons to switch off")
    parser.add_argument(
        "--seeds",
        type=whole_number(1),
        default=4,
        metavar="N",
        help="the number of seeds, with one image for each (default: 4)",
    )
    parser.add_argument(
        "--first-seed",
        type=whole_number(0),
        default=1,
        metavar="SEED",
        help="the first seed; the others are the next whole numbers (default: 1)",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        default=50,
        metavar="N",
        help="the number of denoising steps (default: 50)",
    )
    add_guidance(parser, 7.0, "7, as in the paper")
    add_path(parser, "--out", "the folder for the images", metavar="DIR")
    add_batch_size(parser, 4, "the number of images that are generated at once")


def run(args: argparse.Namespace) -> None:
    """Generate the images of all seeds before and after switching the neurons off, and write them."""
    from nemo_ext.files import check_input_file, check_output_folder

    out = check_output_folder(args.out)
    if args.neurons is not None:
        check_input_file(args.neurons, "neurons", "`nemo-ext localize`")
    from nemo_ext.measure.generation import generate_images
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
    # All images are generated before the first one is written, so that an interrupted command leaves no files.
    _write(out, {**files, "contact-sheet.png": sheet}, description)
    table = new_table(plain(args.prompt), "images", "neurons off", "files")
    for stage, row in rows.items():
        off = str(len(neurons)) if neurons is not None and stage == "after" else "0"
        table.add_row(f"{stage} ({len(row)})", off, f"{stage}-SEED.png")
    show(table, f"Written: {out} (look at {out / 'contact-sheet.png'})")


def _write(out: Path, images: Mapping[str, Image], description: Mapping[str, Any]) -> None:
    """Write the images, file name -> image, and their settings as generation.json."""
    from nemo_ext.files import replacing

    for name, image in images.items():
        with replacing(out / name) as temporary:
            image.save(temporary, format="PNG", optimize=True)
    with replacing(out / "generation.json") as temporary:
        text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
