"""`nemo-ext stats`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import shutil

from nemo_ext.commands.shared import (
    PARTS_WRITTEN,
    PROMPT_LISTS,
    SEVERAL_PROCESSES,
    add_batch_size,
    add_model,
    add_path,
    add_prompt_list,
    load_model,
    new_table,
    read_captions,
    show,
)

NAME = "stats"
SUMMARY = "measure how each neuron reacts to ordinary captions"
DESCRIPTION = f"""\
Measure how strongly each neuron reacts to ordinary captions: the mean and the standard deviation of its
activation over the captions. Only text is processed, and no image is generated. The paper uses 50,000 captions
of LAION; a few thousand are enough. The captions must not be ones that you suspect to be memorized.

reads   --model    a diffusers folder (StableDiffusionPipeline, safetensors)
        --prompts  a list of captions
writes  --out      the statistics, a .safetensors file, which can be used with this model only; or a .pt file for
                   the published scripts, which has the means and the deviations alone; what is finished before
                   that is in OUT.parts, so that the same command continues if it was stopped

{PROMPT_LISTS}
In Python, `ActivationStatistics.merge` combines the statistics of several shards.

{SEVERAL_PROCESSES}
example:
  nemo-ext stats --model ./stable-diffusion-v1-4 --prompts captions.txt --out stats.safetensors
  nemo-ext stats --model ./stable-diffusion-v1-4 --prompts laion.csv --limit 5000 --out statistics_v1_4.pt
"""
WHEN_STOPPED = PARTS_WRITTEN
SHARED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompt_list(parser, "ordinary captions")
    add_path(parser, "--out", "the statistics (.safetensors, or .pt for the published scripts)")
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="WHICH",
        help="value layers to search: all, down+mid (the default for Stable Diffusion), or names separated by commas",
    )
    add_batch_size(parser, 32, "the number of captions that are encoded at once")


def run(args: argparse.Namespace) -> None:
    """Collect the statistics over the captions, write them, and print a summary of each layer."""
    from nemo_ext.files import check_output_file

    out = check_output_file(args.out, suffixes=(".safetensors", ".pt"))
    prompts = read_captions(args)
    pipe = load_model(args)
    from nemo_ext.measure.published import ENDING, PublishedStatistics
    from nemo_ext.measure.statistics import collect_statistics
    from nemo_ext.ranks.parts import parts_beside

    statistics = collect_statistics(
        pipe, prompts, batch_size=args.batch_size, layers=args.layers, parts=parts_beside(out), ranks=args.ranks
    )
    if not args.ranks.first:
        return
    if out.suffix == ENDING:
        PublishedStatistics.of(statistics).save(out)
    else:
        statistics.save(out)
    shutil.rmtree(parts_beside(out))
    table = new_table(f"Activation over {statistics.count} captions", "layer", "neurons", "mean", "std")
    for layer, mean in statistics.mean.items():
        std = statistics.std[layer]
        table.add_row(layer, str(mean.numel()), f"{mean.mean():.4f}", f"{std.mean():.4f}")
    show(table, f"Written: {out}")


def _layers(text: str) -> str | tuple[str, ...]:
    if "," not in text:
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())
