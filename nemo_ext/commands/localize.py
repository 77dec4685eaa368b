"""`nemo-ext localize`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.commands.shared import (
    PROMPT_LISTS,
    SEVERAL_PROCESSES,
    add_model,
    add_path,
    add_prompt_list,
    add_scoring,
    add_sscd,
    load_model,
    read_prompt_selection,
    read_statistics,
    results_table,
    show,
    statistics_of,
    visible_text,
    whole_number,
)
from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from nemo_ext.measure.threshold import Threshold
    from nemo_ext.prompts import Prompt
    from nemo_ext.results.record import Localization
    from nemo_ext.search.verification import Verification

NAME = "localize"
SUMMARY = "find the neurons that carry a prompt's training image"
DESCRIPTION = f"""\
Measure the score of each prompt, and find the few neurons that carry the training image of each memorized one.
Every result has a certificate: the score with these neurons off, and with each of them on again.

The score looks at the first denoising step. So images of several seeds are generated as well, without and with the
neurons, and compared: if the image still comes back, the search goes on, and the result says what the images show.
This is the verification. It costs time, and --no-verify leaves it out.

reads   --model       a diffusers folder
        --prompts     a list of prompts; or --prompt TEXT for each prompt
        --statistics  the file that `nemo-ext stats` wrote for this model, or a .pt file of the published scripts
        --threshold   the file that `nemo-ext threshold` wrote for this model, or a number
writes  --out DIR     DIR/results.jsonl, with one JSON object per prompt, and the neurons of each memorized
                      prompt in DIR/neurons/NNNN-HASH.json, where NNNN is the prompt's position in
                      results.jsonl, counted from 0, and HASH is a hash of the prompt; the compared images in
                      DIR/images/NNNN-HASH/before-SEED.png and after-SEED.png
        --published   the results of the prompts of this call once more, in the columns of the published scripts

{PROMPT_LISTS}
A column or key named type or label, with values such as VM and TM, is kept with the results. With --shard, n
machines share the work; shards that run at the same time need a folder each.

If the command was stopped, run it again to continue. Prompts that are already searched are not searched again.

{SEVERAL_PROCESSES}

example:
  nemo-ext localize --model ./stable-diffusion-v1-4 --prompts suspects.txt \\
      --statistics stats.safetensors --threshold threshold.json --out results
  nemo-ext localize --model ./stable-diffusion-v1-4 --prompts memorized_laion_prompts.csv --shard 1/4 \\
      --statistics stats.safetensors --threshold threshold.json --out results-1 --published results-1.csv
"""
WHEN_STOPPED = "stopped; the results so far are in {out}, run the same command again to continue"
SHARED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        type=visible_text,
        action="append",
        metavar="TEXT",
        help="a prompt; give the option once for each of several",
    )
    add_prompt_list(parser, "prompts", alternatives=prompts)
    add_path(parser, "--statistics", "the statistics of this model")
    parser.add_argument(
        "--threshold",
        type=_threshold_or_file,
        required=True,
        metavar="X|FILE",
        help="a number between 0 and 1, or the file that `nemo-ext threshold` wrote",
    )
    add_path(parser, "--out", "the folder for the results", metavar="DIR")
    parser.add_argument(
        "--published",
        type=Path,
        metavar="CSV",
        help="also write the results as the published scripts do, with the columns Caption;URL;Initial Neurons;"
        "Initial SSIM;Refined Neurons;Refined SSIM",
    )
    parser.add_argument(
        "--search",
        choices=("grouped", "exhaustive"),
        default="grouped",
        help="grouped (default): the paper's decisions, several candidates at a time; exhaustive: the paper's search, "
        "one candidate at a time",
    )
    add_scoring(parser)
    images = parser.add_argument_group("verification on images")
    images.add_argument("--no-verify", action="store_true", help="look at the first denoising step only")
    add_sscd(images)
    images.add_argument(
        "--image-threshold",
        type=_number,
        metavar="X",
        help="τ_image, from 0 to 1 (default: the one in the file of --threshold, with its settings)",
    )
    images.add_argument(
        "--originals",
        type=Path,
        metavar="FILE",
        help="known training images: a CSV file with the columns prompt,image; they are compared, too",
    )
    images.add_argument(
        "--image-budget",
        type=whole_number(0),
        default=96,
        metavar="N",
        help="how many images may be generated per prompt to search by images, where no lower threshold at the first "
        "step helps (default: 96)",
    )


def run(args: argparse.Namespace) -> None:
    """Search every prompt that has no result yet, and write the neurons of all results."""
    from nemo_ext.files import check_output_file, check_output_folder
    from nemo_ext.prompts import labels_of

    out = check_output_folder(args.out)
    if args.published is not None:
        check_output_file(args.published, suffixes=(".csv",))
    prompts = _prompts(args)
    texts = [prompt.text for prompt in prompts]
    labels = labels_of(prompts, args.prompts)
    from nemo_ext.measure.protocol import Protocol
    from nemo_ext.results.folder import NEURONS, ResultsFolder, prompt_name
    from nemo_ext.results.published import write_published_results
    from nemo_ext.search.localizer import Localizer

    threshold = _load_threshold(args.threshold) if isinstance(args.threshold, Path) else args.threshold
    statistics = read_statistics(args.statistics)
    verify = None if args.no_verify else _verification(args, texts)
    pipe = load_model(args)
    localizer = Localizer(
        pipe,
        statistics=statistics_of(statistics, pipe),
        threshold=threshold,
        search=args.search,
        protocol=Protocol.from_name(args.protocol),
        seeds=args.seeds,
        batch_size=args.batch_size,
        verify=verify,
    )
    folder = ResultsFolder(out)
    results: list[Localization] = []
    try:
        found_now = localizer.localize_many(texts, out=out, labels=labels, ranks=args.ranks)
    finally:
        # This runs after Ctrl-C too, so that the neurons of each result in results.jsonl have their file.
        if args.ranks.first:
            if folder.results.exists():
                results = folder.read()
            written = folder.save_neurons(results)
    if not args.ranks.first:
        return
    if args.published is not None:
        write_published_results(args.published, zip(prompts, found_now, strict=True))
    show(
        results_table(results),
        *(f"{prompt_name(index, found.prompt)}: {note}" for index, found in enumerate(results) for note in found.notes),
        f"Written: {folder.results}, {written} sets of neurons in {folder.path / NEURONS}"
        f" ({sum(found.seconds for found in results):.1f} s,"
        f" {sum(found.unet_samples for found in results):.0f} U-Net samples)",
    )


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    from nemo_ext.prompts import Prompt

    if args.prompts is not None:
        return read_prompt_selection(args)
    if args.limit is not None or args.shard is not None:
        raise NemoError("--limit and --shard choose prompts from a list: give one with --prompts")
    return [Prompt(text, label=None, url=None, line=line) for line, text in enumerate(args.prompt, start=1)]


def _verification(args: argparse.Namespace, prompts: Sequence[str]) -> Verification:
    from nemo_ext.measure.originals import read_originals
    from nemo_ext.measure.sscd import load_image_similarity
    from nemo_ext.search.verification import Verification

    originals = {} if args.originals is None else read_originals(args.originals)
    if originals and not set(prompts) & set(originals):
        raise NemoError(f"{args.originals} has training images of none of the prompts: the texts must be equal")
    return Verification(
        similarity=load_image_similarity(args.sscd),
        threshold=args.image_threshold,
        budget=args.image_budget,
        originals=originals,
    )


def _threshold_or_file(text: str) -> float | Path:
    """The type of `--threshold`. A file is loaded later, in `run`, because loading imports torch."""
    try:
        float(text)
    except ValueError:
        if Path(text).is_file():
            return Path(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a file that exists") from None
    return _number(text)


def _number(text: str) -> float:
    """The type of a threshold, a number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't between 0 and 1")
    return number


def _load_threshold(file: Path) -> Threshold:
    """Load the threshold in a file, and check that it is between 0 and 1."""
    from nemo_ext.measure.threshold import Threshold

    threshold = Threshold.load(file)
    if not 0 < threshold.value < 1:
        raise NemoError(f"the threshold in {file} is {threshold.value}, not between 0 and 1: measure it again")
    return threshold
