"""`nemo-ext bake`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_ext.commands.shared import NOTHING_WRITTEN, add_clip_skip, add_path, new_table, quiet_libraries, show

NAME = "bake"
SUMMARY = "write a copy of the model in which neurons are off for good"
DESCRIPTION = """\
Write a copy of a diffusers folder in which neurons are off for good: their rows of to_v are zero. The copy is an
ordinary diffusers folder and loads without nemo_ext. All variants (such as fp16) and shards of the weights are
changed. Every other file is copied byte for byte.

Zero rows are visible to everybody who reads the weights, and a fine-tune or an optimized prompt can bring images
back: docs/bake.md says more.

reads   --model    a diffusers folder, with weights in safetensors
        --neurons  files of neurons (.json, .safetensors), results folders or results.jsonl files, of which the
                   union is taken; the neurons of a result count if its prompt is memorized, unless its images
                   were checked and still replicate
writes  --out DIR  the new folder, which must not exist or be empty; it appears when it is complete. nemo_ext.json
                   in it lists the neurons and their scores. README.md, if there is one, gets a section about
                   them, which is also printed.
        --single-file FILE  the new weights once more, in the layout that other programs read (Stable Diffusion
                   1.x and XL)

example:
  nemo-ext bake --model ./stable-diffusion-v1-4 --neurons results --out ./stable-diffusion-v1-4-baked
"""
WHEN_STOPPED = NOTHING_WRITTEN
SHARED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "--model", "a diffusers folder", metavar="DIR")
    parser.add_argument(
        "--neurons",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files of neurons, results folders, or results.jsonl files",
    )
    add_path(parser, "--out", "the new folder", metavar="DIR")
    parser.add_argument(
        "--single-file",
        type=Path,
        metavar="FILE",
        help="a new file (.safetensors) for the weights in the layout of the original Stable Diffusion code as well",
    )
    add_clip_skip(parser)
    parser.add_argument(
        "--with-prompts",
        action="store_true",
        help="write the prompts of the results into nemo_ext.json; without it, no text of a prompt is in the folder",
    )


def run(args: argparse.Namespace) -> None:
    """Write the new folder, and print what was switched off, and the section for the model card."""
    quiet_libraries()
    from nemo_ext.baking.bake import bake

    baked = bake(
        args.model,
        args.neurons,
        args.out,
        with_prompts=args.with_prompts,
        clip_skip=args.clip_skip,
        single_file=args.single_file,
    )
    table = new_table("Neurons off", "layer", "neurons")
    for layer, indices in baked.neurons.items():
        table.add_row(layer, str(len(indices)))
    files = ", ".join(map(str, baked.changed))
    single = [f"Written: {args.single_file}"] if args.single_file else []
    show(table, *baked.notes, f"Written: {baked.folder} (changed weights: {files})", *single, "")
    print("A section for the model card:\n")
    print(baked.card, end="")
