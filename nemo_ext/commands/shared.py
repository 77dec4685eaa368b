"""What several commands need: common arguments, the captions and the pipeline they name, and tables of results."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from rich.table import Table

    from nemo_ext.results.record import Localization

#: `WHEN_STOPPED` of the commands that keep everything in memory until all of it is done.
NOTHING_WRITTEN = "stopped before anything was written; run the same command to start over"

#: Columns of words. All other columns hold numbers, which must not be broken into two lines.
_WORDS = ("name", "prompt", "layer", "memorized", "files", "images", "what", "value")


# Arguments.


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device` and `--dtype`, from which `load_model` makes the pipeline."""
    add_path(parser, "--model", "a diffusers folder", metavar="DIR")
    parser.add_argument(
        "--device",
        type=_device,
        default=None,
        help="cpu, cuda or cuda:N (default: cuda where there is one and kernels are built for it, else cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the model (default: float32)",
    )


def add_path(parser: argparse.ArgumentParser, flag: str, meaning: str, *, metavar: str = "FILE") -> None:
    """Add the required option `flag`, whose value is a path."""
    parser.add_argument(flag, type=Path, required=True, metavar=metavar, help=meaning)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add `--protocol`, `--seeds` and `--batch-size`: how a prompt's score is measured."""
    parser.add_argument(
        "--protocol",
        choices=("paper", "published-code"),
        default="paper",
        help="how scores are taken (default: paper)",
    )
    parser.add_argument("--seeds", type=whole_number(2), default=10, metavar="N", help="seeds per prompt (default: 10)")
    add_batch_size(parser, None, "U-Net samples at once", "as many as there is memory for, at most --seeds")


def add_batch_size(parser: argparse.ArgumentParser, default: int | None, meaning: str, chosen: str = "") -> None:
    """Add `--batch-size`.

    Args:
        parser: the command's parser.
        default: the value without the option; None where the command chooses one itself.
        meaning: what is in a batch, for the help.
        chosen: how the command chooses, for the help of a `default` that is None.
    """
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=default,
        metavar="N",
        help=f"{meaning}, changes speed and memory only (default: {chosen or default})",
    )


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of `least` or more."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number of {least} or more")
        return number

    return convert


def visible_text(text: str) -> str:
    """The type of an argument that is a text with something to read in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _device(text: str) -> str:
    if text in ("cpu", "cuda") or (text.startswith("cuda:") and text[5:].isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} isn't cpu, cuda or cuda:N")


# What the arguments name.


def read_captions(path: Path) -> list[str]:
    """The captions in a file that a mean and a standard deviation are taken over, which needs two or more.

    Raises:
        NemoError: the file can't be read as text, or holds fewer than two captions.
    """
    from nemo_ext.files import read_prompts

    captions = read_prompts(path)
    if len(captions) < 2:
        raise NemoError(f"a standard deviation needs two captions or more, {path} has one")
    return captions


def load_model(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline of `--model` on `--device` in `--dtype`.

    Raises:
        NemoError: the device can't be used, or the folder holds no pipeline that can be searched.
    """
    import torch

    from nemo_ext.models.loading import load_pipeline

    quiet_libraries()
    return load_pipeline(args.model, device=_usable_device(args.device), dtype=getattr(torch, args.dtype))


def _usable_device(wanted: str | None) -> str:
    """The device `wanted`, if the operators run there; without a wish, CUDA where they do and else the CPU."""
    from nemo_ext import info

    # Where the compiled modules are missing, the import of `nemo_ext.ops` says what to do, and `_module` doesn't.
    importlib.import_module("nemo_ext.ops")
    build = importlib.import_module("nemo_ext._module").build_facts()
    found = [] if wanted == "cpu" else info.gpus()
    device = wanted or ("cuda" if found and info.cuda_obstacle(build, found[0]) is None else "cpu")
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if index >= len(found):
            raise NemoError(f"--device {device}: PyTorch sees {len(found)} CUDA devices, use --device cpu")
        obstacle = info.cuda_obstacle(build, found[index])
        if obstacle is not None:
            raise NemoError(f"--device {device}: {obstacle}; or use --device cpu")
    return device


def quiet_libraries() -> None:
    """Keep diffusers and transformers from writing into the command's own output, and off the network."""
    for switch in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(switch, "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


# What the user sees at the end.


def plain(text: str) -> str:
    """Text on one line, without characters that steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def results_table(results: Sequence[Localization]) -> Table:
    """One row for each prompt of a search."""
    from nemo_ext.results.folder import prompt_name

    table = new_table("Results", "name", "prompt", "memorized", "before", "after", "τ", "neurons")
    for index, found in enumerate(results):
        table.add_row(
            prompt_name(index, found.prompt),
            plain(found.prompt),
            "yes" if found.memorized else "no",
            f"{found.score_before:.3f}",
            "–" if found.score_after is None else f"{found.score_after:.3f}",
            f"{found.threshold:.3f}",
            str(len(found.neurons)),
        )
    return table


def new_table(title: str, *columns: str) -> Table:
    """A table without rows, in the look of all commands."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Layer names are long: without outer padding and vertical lines a table of them fits into 80 columns.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in _WORDS else "right",
            no_wrap=column not in ("prompt", "value"),
            overflow="fold",
        )
    return table


def show(table: Table, *lines: str) -> None:
    """Print a table, and sentences below it."""
    from rich.console import Console

    # Prompts and file names are shown as they are: rich must not read markup, emoji codes or numbers out of them.
    Console(markup=False, emoji=False, highlight=False).print(table)
    for line in lines:
        print(plain(line))
