"""The `nemo-ext` command.

Every subcommand checks all that it was given before it starts to work, says what is wrong in one sentence on
stderr, and leaves no half-written file. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_ext.errors import NemoError

# torch, diffusers and matplotlib take seconds to import: only the commands do so, `--help` doesn't.
if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image
    from rich.table import Table

    from nemo_ext.localizer import Localization

DESCRIPTION = """\
Find the neurons that make a text-to-image diffusion model replicate a training image, and switch them off.

The order of work, on a diffusers folder of a Stable Diffusion 1.x or 2.x model:

  1. nemo-ext stats      how the neurons react to ordinary captions      -> stats.safetensors
  2. nemo-ext threshold  above which score a prompt counts as memorized  -> threshold.json
  3. nemo-ext localize   which neurons carry a prompt's training image   -> results/
  4. nemo-ext generate   images with these neurons off, beside before    -> images/
  5. nemo-ext report     all of it on one HTML page                      -> report.html

`nemo-ext demo` goes the whole way on a small bundled model, offline. Steps 1 and 2 are done once per model.
"""

EPILOG = """\
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
`nemo-ext COMMAND --help` says what a command reads and writes, with an example.
"""

STATS = """\
Measure how strongly each searched neuron reacts to ordinary captions: mean and standard deviation of its
activation over them. Text alone is needed, no image is generated. The paper took 50,000 captions from LAION;
some thousands do. The captions must not be the ones that you suspect to be memorized.

reads   --model    a diffusers folder (StableDiffusionPipeline, safetensors)
        --prompts  a UTF-8 text file, one caption a line
writes  --out      the statistics, one .safetensors file; it fits this model only

example:
  nemo-ext stats --model ./stable-diffusion-v1-4 --prompts captions.txt --out stats.safetensors
"""

THRESHOLD = """\
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

LOCALIZE = """\
Score prompts, and for the memorized ones find the few neurons that carry the training image. Each result
comes with its certificate: the score with the set off, and with each of its neurons on again.

reads   --model       a diffusers folder
        --prompts     a UTF-8 text file, one prompt a line; or --prompt TEXT for a single one
        --statistics  what `nemo-ext stats` wrote for this model
        --threshold   what `nemo-ext threshold` wrote for this model, or a number
writes  --out DIR     DIR/results.jsonl, one object per prompt, and the neurons of each memorized prompt as
                      DIR/neurons/NNNN-HASH.json (place in results.jsonl from 0, hash of the prompt)

Stopped, it goes on where it was: run the same command again. Prompts that are in results.jsonl are kept.

example:
  nemo-ext localize --model ./stable-diffusion-v1-4 --prompts suspects.txt \\
      --statistics stats.safetensors --threshold threshold.json --out results
"""

GENERATE = """\
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

REPORT = """\
Put the results of a search on one HTML page that holds everything in itself and needs no JavaScript: scores
before and after, neurons per layer, certificates, and images where there are some.

reads   --results DIR  DIR/results.jsonl of `nemo-ext localize`, and DIR/images/NNNN-HASH/ where it exists:
                       original.png, before-SEED.png, after-SEED.png
writes  --out          one HTML file

example:
  nemo-ext report --results results --out report.html
"""

DEMO = """\
The whole way on a small bundled model that has memorized some images: statistics, threshold, localization,
images before and after, report. Offline, on the CPU, in about two minutes.

writes  --out DIR  results.jsonl, neurons/, images, a contact sheet and report.html

example:
  nemo-ext demo --out nemo-demo
"""

INFO = """\
Show versions, how the extension was built, and what it finds on this machine. Copy it into bug reports.

example:
  nemo-ext info
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all the others of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `nemo-ext` command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 0
    try:
        with warnings.catch_warnings():
            _tell_own_warnings(args)
            args.run(args)
    except KeyboardInterrupt:
        _complain(args, args.when_stopped.format(**vars(args)))
        return 130
    except NemoError as error:
        if args.debug:
            raise
        _complain(args, str(error))
        return 1
    except OSError as error:
        if args.debug:
            raise
        _complain(args, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except Exception as error:
        if args.debug:
            raise
        reason = str(error) or "no message"
        _complain(args, f"{type(error).__name__}: {reason}; run again with --debug for the traceback")
        return 1
    return 0


def _tell_own_warnings(args: argparse.Namespace) -> None:
    """Show the package's own warnings as sentences, and no other library's."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _complain(args, f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module="nemo_ext")
    warnings.showwarning = show


def _complain(args: argparse.Namespace, message: str) -> None:
    print(f"nemo-ext {args.command}: {_plain(message)}", file=sys.stderr)


def _plain(text: str) -> str:
    """Text on one line, without characters that steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# Arguments.


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each subcommand's function is its default `run`."""
    parser = _Parser(
        prog="nemo-ext",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], None],
        summary: str,
        description: str,
        when_stopped: str = "stopped before anything was written; run the same command to start over",
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, when_stopped=when_stopped)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    stats = command("stats", _stats, "how the neurons react to ordinary captions", STATS)
    _add_model(stats)
    _add_path(stats, "--prompts", "captions, one a line")
    _add_path(stats, "--out", "the statistics (.safetensors)")
    stats.add_argument(
        "--layers",
        type=_layers,
        default="down+mid",
        metavar="WHICH",
        help="value layers to search: down+mid (default), all, or names with commas between them",
    )
    _add_batch_size(stats, 32, "captions encoded at once")

    threshold = command("threshold", _threshold, "above which score a prompt counts as memorized", THRESHOLD)
    _add_model(threshold)
    _add_path(threshold, "--prompts", "captions that aren't memorized, one a line")
    _add_path(threshold, "--out", "the threshold (.json)")
    _add_scoring(threshold)

    localize = command(
        "localize",
        _localize,
        "which neurons carry a prompt's training image",
        LOCALIZE,
        when_stopped="stopped; what is done is in {out}, run the same command again to go on from there",
    )
    _add_model(localize)
    prompts = localize.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=_text, metavar="TEXT", help="one prompt")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    _add_path(localize, "--statistics", "statistics of this model")
    localize.add_argument(
        "--threshold",
        type=_threshold_or_file,
        required=True,
        metavar="X|FILE",
        help="a number between 0 and 1, or a file of `nemo-ext threshold`",
    )
    _add_path(localize, "--out", "folder of the results", metavar="DIR")
    localize.add_argument(
        "--search",
        choices=("exhaustive", "guided"),
        default="exhaustive",
        help="exhaustive (default): the paper's, candidate by candidate; guided: by a gradient, in far less time",
    )
    _add_scoring(localize)

    generate = command("generate", _generate, "images with neurons off, beside before", GENERATE)
    _add_model(generate)
    generate.add_argument("--prompt", type=_text, required=True, metavar="TEXT", help="the prompt")
    generate.add_argument("--neurons", type=Path, metavar="FILE", help="the neurons to switch off")
    generate.add_argument("--seeds", type=_whole(1), default=4, metavar="N", help="images per row (default: 4)")
    generate.add_argument(
        "--first-seed",
        type=_whole(0),
        default=1,
        metavar="SEED",
        help="seed of the first image, the others count up from it (default: 1)",
    )
    generate.add_argument("--steps", type=_whole(1), default=50, metavar="N", help="denoising steps (default: 50)")
    generate.add_argument(
        "--guidance",
        type=_guidance,
        default=7.0,
        metavar="X",
        help="classifier-free guidance (default: 7, as in the paper)",
    )
    _add_path(generate, "--out", "folder of the images", metavar="DIR")
    _add_batch_size(generate, 4, "images generated at once")

    report = command("report", _report, "all of it on one HTML page", REPORT)
    _add_path(report, "--results", "folder that `nemo-ext localize` wrote", metavar="DIR")
    _add_path(report, "--out", "the page (.html)")
    report.add_argument("--title", type=_text, default="NeMo report", help="the page's title")

    demo = command(
        "demo",
        _demo,
        "the whole way on a bundled model, offline",
        DEMO,
        when_stopped="stopped; run the same command to start over",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("nemo-demo"),
        metavar="DIR",
        help="folder of the results (default: nemo-demo)",
    )

    info = command("info", _info, "versions, build, and what is found on this machine", INFO)
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    return parser


class _Version(argparse.Action):
    """`--version`, which imports the package only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nemo_ext import __version__

        print(f"nemo-ext {__version__}")
        parser.exit()


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "--model", "a diffusers folder", metavar="DIR")
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


def _add_path(parser: argparse.ArgumentParser, flag: str, meaning: str, *, metavar: str = "FILE") -> None:
    parser.add_argument(flag, type=Path, required=True, metavar=metavar, help=meaning)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        choices=("paper", "published-code"),
        default="paper",
        help="how scores are taken (default: paper)",
    )
    parser.add_argument("--seeds", type=_whole(2), default=10, metavar="N", help="seeds per prompt (default: 10)")
    _add_batch_size(parser, None, "U-Net samples at once", "as many as there is memory for, at most --seeds")


def _add_batch_size(parser: argparse.ArgumentParser, default: int | None, meaning: str, chosen: str = "") -> None:
    parser.add_argument(
        "--batch-size",
        type=_whole(1),
        default=default,
        metavar="N",
        help=f"{meaning}, changes speed and memory only (default: {chosen or default})",
    )


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number of {least} or more")
        return number

    return convert


def _guidance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return number


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _device(text: str) -> str:
    if text in ("cpu", "cuda") or (text.startswith("cuda:") and text[5:].isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} isn't cpu, cuda or cuda:N")


def _layers(text: str) -> str | tuple[str, ...]:
    if text in ("down+mid", "all"):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _threshold_or_file(text: str) -> float | Path:
    try:
        number = float(text)
    except ValueError:
        if Path(text).is_file():
            return Path(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a file that exists") from None
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't between 0 and 1")
    return number


# Commands. Each checks everything it was given, then works, then writes.


def _stats(args: argparse.Namespace) -> None:
    from nemo_ext.files import check_output_file, read_prompts

    out = check_output_file(args.out, suffixes=(".safetensors",))
    prompts = read_prompts(args.prompts)
    if len(prompts) < 2:
        raise NemoError(f"a standard deviation needs two captions or more, {args.prompts} has one")
    pipe = _load(args)
    from nemo_ext.statistics import collect_statistics

    statistics = collect_statistics(pipe, prompts, batch_size=args.batch_size, layers=args.layers)
    statistics.save(out)
    table = _table(f"Activation over {statistics.count} captions", "layer", "neurons", "mean", "std")
    for layer, mean in statistics.mean.items():
        std = statistics.std[layer]
        table.add_row(layer, str(mean.numel()), f"{mean.mean():.4f}", f"{std.mean():.4f}")
    _show(table, f"Written: {out}")


def _threshold(args: argparse.Namespace) -> None:
    from nemo_ext.files import check_output_file, read_prompts

    out = check_output_file(args.out, suffixes=(".json",))
    prompts = read_prompts(args.prompts)
    if len(prompts) < 2:
        raise NemoError(f"a standard deviation needs two captions or more, {args.prompts} has one")
    pipe = _load(args)
    from nemo_ext.scoring import Protocol, memorization_threshold

    threshold = memorization_threshold(
        pipe,
        prompts,
        seeds=args.seeds,
        protocol=Protocol.from_name(args.protocol),
        batch_size=args.batch_size,
    )
    threshold.save(out)
    table = _table("Memorization threshold", "prompts", "seeds", "mean", "std", "highest", "τ")
    table.add_row(
        str(len(threshold.scores)),
        str(threshold.seeds),
        f"{threshold.mean:.3f}",
        f"{threshold.std:.3f}",
        f"{max(threshold.scores):.3f}",
        f"{threshold.value:.3f}",
    )
    _show(table, f"Written: {out}")


def _localize(args: argparse.Namespace) -> None:
    from nemo_ext.files import check_input_file, check_output_folder, read_prompts

    out = check_output_folder(args.out)
    check_input_file(args.statistics, "statistics", "`nemo-ext stats`")
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    from nemo_ext.localizer import RESULTS, Localizer, read_results
    from nemo_ext.scoring import Protocol, Threshold
    from nemo_ext.statistics import ActivationStatistics

    threshold = args.threshold
    if isinstance(threshold, Path):
        threshold = Threshold.load(threshold)
        if not 0 < threshold.value < 1:
            raise NemoError(
                f"the threshold in {args.threshold} is {threshold.value}, not between 0 and 1: compute it again"
            )
    statistics = ActivationStatistics.load(args.statistics)
    if not all(bool(std.isfinite().all()) for std in (*statistics.mean.values(), *statistics.std.values())):
        raise NemoError(f"the statistics in {args.statistics} hold NaN or infinity: collect them again")
    localizer = Localizer(
        _load(args),
        statistics=statistics,
        threshold=threshold,
        search=args.search,
        protocol=Protocol.from_name(args.protocol),
        seeds=args.seeds,
        batch_size=args.batch_size,
    )
    results: list[Localization] = []
    try:
        localizer.localize_many(prompts, out=out)
    finally:
        # Also after Ctrl-C: what is in results.jsonl has its neurons beside it.
        if (out / RESULTS).exists():
            results = read_results(out)
        written = _write_neurons(out, results)
    _show(
        _results_table(results),
        *(f"{_name(index, found)}: {note}" for index, found in enumerate(results) for note in found.notes),
        f"Written: {out / RESULTS}, {written} sets of neurons in {out / 'neurons'}"
        f" ({sum(found.seconds for found in results):.1f} s,"
        f" {sum(found.unet_samples for found in results):.0f} U-Net samples)",
    )


def _report(args: argparse.Namespace) -> None:
    from nemo_ext.files import check_output_file

    out = check_output_file(args.out, suffixes=(".html", ".htm"))
    from nemo_ext.localizer import read_results
    from nemo_ext.report import find_images, write_report

    results = read_results(args.results)
    write_report(out, results, images=find_images(args.results, results), title=args.title)
    _show(_results_table(results), f"Written: {out}")


def _generate(args: argparse.Namespace) -> None:
    from nemo_ext.atomic import replacing
    from nemo_ext.files import check_input_file, check_output_folder

    out = check_output_folder(args.out)
    if args.neurons is not None:
        check_input_file(args.neurons, "neurons", "`nemo-ext localize`")
    from nemo_ext.neurons import NeuronSet
    from nemo_ext.patching import patched
    from nemo_ext.report import contact_sheet

    neurons = None if args.neurons is None else NeuronSet.load(args.neurons)
    pipe = _load(args)
    if neurons is not None:
        neurons.check(pipe)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = {"before": _images(pipe, args, seeds)}
    if neurons is not None:
        with patched(pipe, neurons):
            rows["after"] = _images(pipe, args, seeds)
    sheet = contact_sheet(
        [(f"{name}: {args.prompt}", images) for name, images in rows.items()],
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
    # Everything is in memory by now: an interrupted generation leaves nothing behind.
    files = {
        f"{name}-{seed}.png": image for name, images in rows.items() for seed, image in zip(seeds, images, strict=True)
    }
    for name, image in {**files, "contact-sheet.png": sheet}.items():
        with replacing(out / name) as temporary:
            image.save(temporary, format="PNG", optimize=True)
    with replacing(out / "generation.json") as temporary:
        text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    table = _table(_plain(args.prompt), "images", "neurons off", "files")
    for name, images in rows.items():
        off = str(len(neurons)) if neurons is not None and name == "after" else "0"
        table.add_row(f"{name} ({len(images)})", off, f"{name}-SEED.png")
    _show(table, f"Written: {out} (look at {out / 'contact-sheet.png'})")


def _images(pipe: StableDiffusionPipeline, args: argparse.Namespace, seeds: range) -> list[Image]:
    """Images of the prompt, one per seed, whatever the batch size."""
    import numpy
    import torch

    images: list[Image] = []
    for start in range(0, len(seeds), args.batch_size):
        chunk = seeds[start : start + args.batch_size]
        made = pipe(
            [args.prompt] * len(chunk),
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            # On the CPU, so that a seed means the same image on every device.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in chunk],
            output_type="np",
        ).images
        if not numpy.isfinite(made).all():
            raise NemoError("the images hold NaN: the model overflows in this precision, use --dtype float32")
        images += pipe.image_processor.numpy_to_pil(made)
    return images


def _demo(args: argparse.Namespace) -> None:
    from nemo_ext.files import check_output_folder

    out = check_output_folder(args.out)
    _quiet_libraries()
    from nemo_ext.demo import run

    run(out)


def _info(args: argparse.Namespace) -> None:
    from nemo_ext import info

    facts = info.collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        table = _table("nemo_ext", "what", "value")
        for name, value in _flat(facts):
            table.add_row(name, value)
        _show(table)
    if "error" in facts:
        raise NemoError(f"the extension doesn't work here: {facts['error']}")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as rows: `packages: {torch: …}` becomes `packages torch`."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + name, text


# What the commands share.


def _load(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline of `--model` on `--device` in `--dtype`."""
    import torch

    from nemo_ext import info
    from nemo_ext.files import load_pipeline

    _quiet_libraries()
    # Before the other compiled module: it says what to do where they are missing.
    importlib.import_module("nemo_ext.ops")
    build = importlib.import_module("nemo_ext._module").build_facts()
    found = [] if args.device == "cpu" else info.gpus()
    device = args.device or ("cuda" if found and info.cuda_obstacle(build, found[0]) is None else "cpu")
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if index >= len(found):
            raise NemoError(f"--device {device}: PyTorch sees {len(found)} CUDA devices, use --device cpu")
        obstacle = info.cuda_obstacle(build, found[index])
        if obstacle is not None:
            raise NemoError(f"--device {device}: {obstacle}; or use --device cpu")
    return load_pipeline(args.model, device=device, dtype=getattr(torch, args.dtype))


def _quiet_libraries() -> None:
    """Keep diffusers and transformers from talking into the command's own output, and off the network."""
    for switch in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(switch, "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


def _write_neurons(out: Path, results: Sequence[Localization]) -> int:
    """Write each memorized prompt's neurons to a file of its own; return how many files there are."""
    folder = out / "neurons"
    written = 0
    for index, found in enumerate(results):
        if len(found.neurons):
            folder.mkdir(exist_ok=True)
            found.neurons.save(folder / f"{_name(index, found)}.json")
            written += 1
    return written


def _name(index: int, found: Localization) -> str:
    from nemo_ext.files import prompt_name

    return prompt_name(index, found.prompt)


def _results_table(results: Sequence[Localization]) -> Table:
    table = _table("Results", "name", "prompt", "memorized", "before", "after", "τ", "neurons")
    for index, found in enumerate(results):
        table.add_row(
            _name(index, found),
            _plain(found.prompt),
            "yes" if found.memorized else "no",
            f"{found.score_before:.3f}",
            "–" if found.score_after is None else f"{found.score_after:.3f}",
            f"{found.threshold:.3f}",
            str(len(found.neurons)),
        )
    return table


#: Columns of words; all others hold numbers, which are never broken into two lines.
_WORDS = ("name", "prompt", "layer", "memorized", "files", "images", "what", "value")


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for layer names in 80 columns.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in _WORDS else "right",
            no_wrap=column not in ("prompt", "value"),
            overflow="fold",
        )
    return table


def _show(table: Table, *lines: str) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False).print(table)
    for line in lines:
        print(_plain(line))
