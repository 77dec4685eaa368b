"""Code that several commands need: common arguments, loading captions and pipelines, and tables of results."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_ext.measure.published import PublishedStatistics
    from nemo_ext.measure.statistics import ActivationStatistics
    from nemo_ext.prompts import Prompt
    from nemo_ext.results.record import Localization

#: `WHEN_STOPPED` of the commands that write their files at the very end.
NOTHING_WRITTEN = "stopped before anything was written; run the same command again to start from the beginning"

#: `WHEN_STOPPED` of the commands that keep what is finished beside their file.
PARTS_WRITTEN = "stopped; what is finished is in {out}.parts, run the same command again to continue"

#: A paragraph for the descriptions of the commands whose work several processes can share.
SEVERAL_PROCESSES = """\
Several GPUs, or several machines with one file system, share the work if torchrun starts the command:
torchrun --nproc-per-node N -m nemo_ext ... (docs/scale.md).
"""

#: A paragraph for the descriptions of the commands that read lists of prompts.
PROMPT_LISTS = """\
A list of prompts is a UTF-8 file: text with one prompt per line; or .csv, with semicolons, commas or tabs, and a
column named caption, prompt or text; or .jsonl, with such a key in each line. --limit N takes the first N prompts
of it, and --shard i/n every n-th of these, beginning with the i-th.
"""

#: Columns that contain words, which are aligned to the left. All other columns contain numbers.
_WORDS = ("name", "prompt", "label", "layer", "memorized", "files", "images", "what", "value")


# Arguments.


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device`, `--dtype`, `--clip-skip` and `--latent-size`, which `load_model` reads."""
    add_path(parser, "--model", "a diffusers folder", metavar="DIR")
    parser.add_argument(
        "--device",
        type=_device,
        default=None,
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU that the kernels were built for, else cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the precision of the model (default: float32)",
    )
    add_clip_skip(parser)
    parser.add_argument(
        "--latent-size",
        type=_size,
        metavar="HxW",
        help="height and width of the latents, such as 64x96 for images of 512x768 (default: what the model says)",
    )


def add_clip_skip(parser: argparse.ArgumentParser) -> None:
    """Add `--clip-skip`."""
    parser.add_argument(
        "--clip-skip",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="leave out the last N layers of the text encoder, as diffusers' clip_skip does (default: 0)",
    )


def add_path(parser: argparse.ArgumentParser, flag: str, meaning: str, *, metavar: str = "FILE") -> None:
    """Add the required option `flag`, whose value is a path."""
    parser.add_argument(flag, type=Path, required=True, metavar=metavar, help=meaning)


def add_prompt_list(
    parser: argparse.ArgumentParser, meaning: str, *, alternatives: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Add `--prompts`, `--limit` and `--shard`, which `read_prompt_selection` reads.

    Args:
        parser: the command's parser.
        meaning: what the prompts are, for the help text.
        alternatives: the group that `--prompts` belongs to; None: the option is required.
    """
    (parser if alternatives is None else alternatives).add_argument(
        "--prompts",
        type=Path,
        required=alternatives is None,
        metavar="FILE",
        help=f"{meaning}: text with one per line, .csv or .jsonl",
    )
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="take the first N prompts (default: all)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="i/n",
        help="take the i-th of n parts of these prompts, such as 1/4 (default: all)",
    )


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add `--protocol`, `--seeds` and `--batch-size`, which say how a prompt's score is measured."""
    parser.add_argument(
        "--protocol",
        choices=("paper", "published-code"),
        default="paper",
        help="how scores are measured (default: paper)",
    )
    parser.add_argument(
        "--seeds", type=whole_number(2), default=10, metavar="N", help="the number of seeds per prompt (default: 10)"
    )
    add_batch_size(parser, None, "the number of latents in one U-Net call", "as many as memory allows, up to --seeds")


def add_sscd(parser: argparse._ActionsContainer) -> None:
    """Add `--sscd`, which `load_image_similarity` reads."""
    parser.add_argument(
        "--sscd",
        type=Path,
        metavar="FILE",
        help="compare images with this SSCD network, a TorchScript (.pt) or ONNX (.onnx) file (default: compare the "
        "structure of their pixels, which needs no file and is less reliable)",
    )


def add_guidance(parser: argparse._ActionsContainer, default: float | None, chosen: str) -> None:
    """Add `--guidance`, the scale of classifier-free guidance; `chosen` says what the default is."""
    parser.add_argument(
        "--guidance",
        type=_guidance,
        default=default,
        metavar="X",
        help=f"the scale of classifier-free guidance (default: {chosen})",
    )


def add_batch_size(parser: argparse.ArgumentParser, default: int | None, meaning: str, chosen: str = "") -> None:
    """Add `--batch-size`.

    Args:
        parser: the command's parser.
        default: the value if the option is missing; None: the command chooses the value.
        meaning: what the option is, for the help text.
        chosen: how the command chooses the value if `default` is None, for the help text.
    """
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=default,
        metavar="N",
        help=f"{meaning}; it affects only speed and memory (default: {chosen or default})",
    )


def whole_number(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number of `least` or more."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number of {least} or more")
        return number

    return convert


def _shard(text: str) -> tuple[int, int]:
    """The type of `--shard`: the part, counted from 1, and the number of parts."""
    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} isn't a part such as 1/4, from 1/n to n/n")


def visible_text(text: str) -> str:
    """The type of an argument that is a text with at least one visible character."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _device(text: str) -> str:
    if text in ("cpu", "cuda") or (text.startswith("cuda:") and text[5:].isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} isn't cpu, cuda or cuda:N")


def _size(text: str) -> tuple[int, int]:
    """The type of `--latent-size`."""
    height, times, width = text.partition("x")
    if times and height.isdecimal() and width.isdecimal() and int(height) and int(width):
        return int(height), int(width)
    raise argparse.ArgumentTypeError(f"{text!r} isn't a height and a width such as 64x96")


def _guidance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return number


# Loading what the arguments name.


def read_prompt_selection(args: argparse.Namespace) -> list[Prompt]:
    """Read the list `--prompts`, and choose the prompts of `--limit` and `--shard`.

    Raises:
        NemoError: the list cannot be read, or the shard has no prompt.
    """
    from nemo_ext.prompts import read_prompt_list

    prompts = read_prompt_list(args.prompts)[: args.limit]
    if args.shard is None:
        return prompts
    part, parts = args.shard
    if part > len(prompts):
        raise NemoError(f"--shard {part}/{parts} has no prompt, because there are {len(prompts)} in all")
    return prompts[part - 1 :: parts]


def read_captions(args: argparse.Namespace) -> list[str]:
    """Read the captions that `--prompts`, `--limit` and `--shard` choose, for a mean and a standard deviation.

    Raises:
        NemoError: the list cannot be read, or fewer than two captions are chosen.
    """
    captions = [prompt.text for prompt in read_prompt_selection(args)]
    if len(captions) < 2:
        raise NemoError(f"a standard deviation needs two captions or more, {args.prompts} gives one")
    return captions


def read_statistics(path: Path) -> ActivationStatistics | PublishedStatistics:
    """Read statistics, which `statistics_of` then fits to the model. They are read first, because that takes no time.

    Args:
        path: what `nemo-ext stats` or the published code has written.

    Raises:
        NemoError: there is no such file, or it has no statistics or values that are not finite.
    """
    from nemo_ext.files import check_input_file
    from nemo_ext.measure.published import ENDING, PublishedStatistics
    from nemo_ext.measure.statistics import ActivationStatistics

    check_input_file(path, "statistics", "`nemo-ext stats`")
    if path.suffix.lower() == ENDING:
        return PublishedStatistics.load(path)
    statistics = ActivationStatistics.load(path)
    # A neuron with NaN would never be selected.
    if not all(bool(values.isfinite().all()) for values in (*statistics.mean.values(), *statistics.std.values())):
        raise NemoError(f"the statistics in {path} hold NaN or infinity: collect them again")
    return statistics


def statistics_of(statistics: ActivationStatistics | PublishedStatistics, pipe: Any) -> ActivationStatistics:
    """Fit statistics to a pipeline, and say so if they do not name the model that they belong to.

    Raises:
        NemoError: they are published statistics of layers of other widths.
    """
    from nemo_ext.measure.statistics import ActivationStatistics

    if isinstance(statistics, ActivationStatistics):
        return statistics
    print("The published statistics do not name their model. Only the number of neurons in each layer was compared.")
    return statistics.for_model(pipe)


def load_model(args: argparse.Namespace) -> Any:
    """Load the pipeline in the folder `--model` on `--device` in `--dtype`.

    Raises:
        NemoError: the device cannot be used, or as for `load_pipeline`.
    """
    import torch

    from nemo_ext.commands.devices import usable_device
    from nemo_ext.models.loading import load_pipeline

    quiet_libraries()
    return load_pipeline(
        args.model,
        device=usable_device(args.device, args.ranks),
        dtype=getattr(torch, args.dtype),
        clip_skip=args.clip_skip,
        latent_size=args.latent_size,
    )


def quiet_libraries() -> None:
    """Prevent diffusers and transformers from printing into the command's output and from using the network."""
    for switch in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(switch, "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


# Printing results.


def plain(text: str) -> str:
    """Return text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def results_table(results: Sequence[Localization]) -> Table:
    """Return a table with one row for each result."""
    from nemo_ext.results.folder import prompt_name
    from nemo_ext.results.words import short_verdict

    labelled = any(found.label is not None for found in results)
    label = ("label",) if labelled else ()
    table = new_table("Results", "name", "prompt", *label, "neurons", "first step", "τ", "images")
    for index, found in enumerate(results):
        table.add_row(
            prompt_name(index, found.prompt),
            plain(found.prompt),
            *((plain(found.label or "–"),) if labelled else ()),
            str(len(found.neurons)),
            f"{found.score_before:.3f}" + ("" if found.score_after is None else f" → {found.score_after:.3f}"),
            f"{found.threshold:.3f}",
            short_verdict(found),
        )
    return table


def new_table(title: str, *columns: str) -> Table:
    """Return a table without rows, in the style of all commands."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Layer names are long. Without outer padding and vertical lines, a table with them fits into 80 columns.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in _WORDS else "right",
            no_wrap=column not in ("prompt", "value", "images"),
            overflow="fold",
        )
    return table


def show(table: Table, *lines: str) -> None:
    """Print a table, and then lines of text."""
    from rich.console import Console

    # Prompts and file names are printed as they are: rich must not interpret markup, emoji codes or numbers in them.
    Console(markup=False, emoji=False, highlight=False).print(table)
    for line in lines:
        print(plain(line))
