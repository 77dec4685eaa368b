"""`nemo-ext evaluate`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.commands.shared import (
    SEVERAL_PROCESSES,
    add_batch_size,
    add_guidance,
    add_model,
    add_path,
    add_sscd,
    load_model,
    new_table,
    plain,
    read_statistics,
    show,
    statistics_of,
    whole_number,
)
from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_ext.evaluate.detection import DetectionTable
    from nemo_ext.evaluate.reference import Reference
    from nemo_ext.evaluate.table import Evaluation, OrdinaryEvaluation, PromptEvaluation, SummaryRow
    from nemo_ext.measure.originals import Originals
    from nemo_ext.measure.statistics import ActivationStatistics
    from nemo_ext.neurons import NeuronSet
    from nemo_ext.results.record import Localization

NAME = "evaluate"
SUMMARY = "measure on images what the found neurons do, as the paper's tables do"
DESCRIPTION = f"""\
Generate images of each memorized prompt in a results folder three times: before, with the found neurons off
(after), and with as many random neurons of the same layers off (control). Then measure on them

  copies     SSCD with the training image (SSCD_orig), and with the same seed's image before (SSCD_gen); PDQ
             hash and pixel correlation; whether another prompt's training image appears instead
  diversity  SSCD between the images of different seeds
  alignment  CLIP similarity of image and prompt
  quality    FID and KID between ordinary images before and after all found neurons are off
  detection  how well scores tell memorized prompts from ordinary ones

With --neurons, one set of neurons is measured on all memorized prompts, instead of each prompt's own: the union of
all of them, for example (`nemo-ext neurons`).

Each figure is a median over prompts with the median absolute deviation. A measure is left out if what it needs is
not given, and the command says so. Nothing is downloaded.

reads   --model       the diffusers folder that was searched
        --results     the folder that `nemo-ext localize` wrote to
        --originals   training images: a CSV file with the columns prompt,image and, if known, label (VM for
                      verbatim, TM for template); paths of images are relative to this file
        --ordinary    a list of ordinary prompts, for quality and detection: text with one per line, .csv or .jsonl
        --statistics  the statistics of the search, for detection by the text alone
        --sscd        SSCD's network: sscd_disc_mixup.torchscript.pt from
                      github.com/facebookresearch/sscd-copy-detection, or an ONNX file of it
        --clip        a CLIP folder with safetensors, such as openai/clip-vit-base-patch32
        --inception   FID's network: the TorchScript file inception-2015-12-05.pt; without it, the distances
                      are taken over EfficientNet-lite0, if that is installed, and are named FD-lite0 and KD-lite0
        --neurons     one set of neurons for all prompts (.json, .safetensors)
writes  DIR/evaluation.json, DIR/evaluation.csv (prompts) and DIR/evaluation-summary.csv, with DIR as in --results,
        or as in --out; and the images: before-SEED.png, after-SEED.png and control-DRAW-SEED.png in
        DIR/evaluation/NNNN-HASH/. `nemo-ext report` shows the tables.

If the command was stopped, run it again to continue. Images that exist are used again if they were made with the
same settings.

{SEVERAL_PROCESSES}
example:
  nemo-ext evaluate --model ./stable-diffusion-v1-4 --results results --originals originals.csv \\
      --sscd sscd_disc_mixup.torchscript.pt --clip ./clip-vit-base-patch32 --reference paper
"""
WHEN_STOPPED = "stopped; what is finished is kept, run the same command again to continue"
SHARED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_path(parser, "--results", "the folder that `nemo-ext localize` wrote to", metavar="DIR")
    for flag, metavar, meaning in (
        ("--originals", "CSV", "the training images of the prompts"),
        ("--ordinary", "FILE", "ordinary prompts: text with one per line, .csv or .jsonl"),
        ("--neurons", "FILE", "one set of neurons for all prompts; needs --out"),
        ("--out", "DIR", "the folder for what is written (default: that of --results)"),
        ("--statistics", "FILE", "the statistics of this model, from `nemo-ext stats`"),
        ("--clip", "DIR", "the folder of a CLIP model"),
        ("--inception", "FILE", "FID's Inception network"),
    ):
        parser.add_argument(flag, type=Path, metavar=metavar, help=meaning)
    add_sscd(parser)
    parser.add_argument(
        "--seeds", type=whole_number(2), default=10, metavar="N", help="the number of images of a prompt (default: 10)"
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=50, metavar="N", help="the number of denoising steps (default: 50)"
    )
    add_guidance(parser, 7.0, "7, as in the paper")
    parser.add_argument(
        "--draws",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="how many random sets of neurons are drawn for each prompt (default: 3)",
    )
    parser.add_argument(
        "--reference",
        choices=("paper",),
        help="print the paper's values for Stable Diffusion 1.4 beside the measured ones",
    )
    add_batch_size(parser, 4, "the number of images that are generated at once")


def run(args: argparse.Namespace) -> None:
    """Load everything, generate and measure, and write and print the tables."""
    from nemo_ext.files import check_input_file, check_output_folder, read_prompts
    from nemo_ext.neurons import NeuronSet
    from nemo_ext.results.folder import ResultsFolder

    if args.results.is_file():
        raise NemoError(f"{args.results} is a file: give the folder that `nemo-ext localize` wrote to")
    # Everything that can be wrong is read before the first image is generated, and what is small is read first.
    results = ResultsFolder(args.results).read()
    if args.neurons is not None:
        if args.out is None:
            raise NemoError(
                "--neurons needs --out DIR, because --results keeps the evaluation of each prompt's own set"
            )
        results = _with_one_set(
            results, NeuronSet.load(check_input_file(args.neurons, "neurons", "`nemo-ext neurons`"))
        )
    out = check_output_folder(args.results if args.out is None else args.out)
    ordinary = [] if args.ordinary is None else read_prompts(args.ordinary)
    from nemo_ext.evaluate.alignment import PromptAlignment
    from nemo_ext.evaluate.evaluation import check_model, check_prompt_sets, evaluate_results, generate_shared
    from nemo_ext.evaluate.quality import load_feature_network
    from nemo_ext.evaluate.reference import REFERENCES
    from nemo_ext.measure.generation import Sampling
    from nemo_ext.measure.originals import read_originals
    from nemo_ext.measure.sscd import load_image_similarity
    from nemo_ext.progress import Progress

    originals = None if args.originals is None else read_originals(args.originals)
    check_prompt_sets(results, originals, ordinary)
    similarity = load_image_similarity(args.sscd)
    clip = None if args.clip is None else PromptAlignment(args.clip)
    inception = load_feature_network(args.inception) if ordinary else None
    read = None if args.statistics is None else read_statistics(args.statistics)
    pipe = load_model(args)
    statistics = None if read is None else statistics_of(read, pipe)
    settings: dict[str, Any] = {
        "sampling": Sampling(seeds=args.seeds, steps=args.steps, guidance=args.guidance),
        "draws": args.draws,
        "ordinary": ordinary,
        "folder": out,
        "batch_size": args.batch_size,
    }
    check_model(pipe, [found for found in results if found.memorized], statistics)
    with Progress() as bars:
        if args.ranks.count > 1:
            generate_shared(pipe, results, **settings, ranks=args.ranks, progress=bars)
        detection = None
        if ordinary:
            detection = _detection(args, out, pipe, results, originals, ordinary, statistics, bars)
        if not args.ranks.first:
            return
        evaluation = evaluate_results(
            pipe,
            results,
            originals=originals,
            similarity=similarity,
            clip=clip,
            inception=None if isinstance(inception, str) else inception,
            statistics=statistics,
            **settings,
            progress=bars,
        )
        if detection is not None:
            evaluation = evaluation.with_detection(detection.to_dict())
    files = evaluation.save(out)
    shutil.rmtree(ResultsFolder(out).detector_parts, ignore_errors=True)
    _print(evaluation, detection, REFERENCES.get(args.reference), originals is not None)
    # With several ranks, this one has found the images of all of them.
    reused = "" if args.ranks.count > 1 else f", {evaluation.reused_images} images of an earlier run"
    written = ", ".join(map(str, files))
    print(plain(f"Written: {written}, and images in {out} ({evaluation.seconds:.0f} s{reused})"))


def _with_one_set(results: Sequence[Localization], neurons: NeuronSet) -> list[Localization]:
    """The results as if the search had found the same neurons for all memorized prompts, which nobody has verified."""
    return [replace(found, neurons=neurons, verdict=None) if found.memorized else found for found in results]


def _detection(
    args: argparse.Namespace,
    out: Path,
    pipe: Any,
    results: Sequence[Localization],
    originals: Originals | None,
    ordinary: Sequence[str],
    statistics: ActivationStatistics | None,
    bars: Any,
) -> DetectionTable:
    """Measure the detectors on the memorized prompts of the results and on the ordinary prompts."""
    from nemo_ext.evaluate.detection import measure_detectors
    from nemo_ext.results.folder import ResultsFolder

    # A prompt with a training image is memorized, whatever the search says. Otherwise the search is all that is known.
    memorized = [
        found.prompt for found in results if (found.memorized if originals is None else found.prompt in originals)
    ]
    prompts, labels = [*memorized, *ordinary], [True] * len(memorized) + [False] * len(ordinary)
    return measure_detectors(
        pipe,
        prompts,
        labels,
        statistics=statistics,
        guidance=args.guidance,
        parts=ResultsFolder(out).detector_parts,
        ranks=args.ranks,
        progress=bars,
    )


# Printing.


def _print(
    evaluation: Evaluation, detection: DetectionTable | None, reference: Reference | None, labelled: bool
) -> None:
    from nemo_ext.evaluate.table import ALL
    from nemo_ext.measure.originals import LABELS

    show(_prompt_table(evaluation), *evaluation.notes())
    rows = evaluation.summary()
    for group in evaluation.groups:
        count = sum(group in (ALL, one.label) for one in evaluation.prompts)
        title = "All memorized prompts" if group == ALL else plain(f"{group}, {LABELS.get(group, 'labelled')} prompts")
        show(_summary_table(f"{title} ({count})", [row for row in rows if row.group == group], group, reference))
    if evaluation.ordinary is not None:
        show(_ordinary_table(evaluation.ordinary, evaluation.short_similarity))
    if detection is not None:
        show(_detection_table(detection, reference))
        if not labelled:
            print(
                "Without --originals, the search itself says which prompts are memorized, which favours NeMo's score."
            )
    if reference is not None:
        for line in (f"The paper's values are from {reference.source}.", *reference.notes):
            print(line)
    print(f"Similarity of images: {plain(evaluation.similarity)}.")
    for column, reason in evaluation.omitted.items():
        print(plain(f"{column}: {reason}."))
    if evaluation.not_memorized:
        print(f"Results that are not memorized, and were not evaluated: {evaluation.not_memorized}.")


def _prompt_table(evaluation: Evaluation) -> Table:
    """One row for each prompt: the few columns that show whether the neurons work; the files have all of them."""
    short = evaluation.short_similarity
    shown = [
        one for one in evaluation.measures if one.name in (f"{short}_orig", f"{short}_gen", f"{short} between seeds")
    ]
    headers = [one.name.removeprefix(f"{short} ") for one in shown]
    labelled = len(evaluation.groups) > 1
    table = new_table(
        "Memorized prompts: before → after",
        *("prompt", *(("label",) if labelled else ()), "neurons", *headers),
    )

    def cell(one: PromptEvaluation, measure: Any) -> str:
        before, after = (_number(one.value(measure, stage)) for stage in ("before", "after"))
        return f"{before}→{after}" if measure.name != f"{short}_gen" else after

    for one in evaluation.prompts:
        label = (plain(one.label or "–"),) if labelled else ()
        table.add_row(plain(one.prompt), *label, str(one.after.neurons), *(cell(one, measure) for measure in shown))
    return table


def _summary_table(title: str, rows: Sequence[SummaryRow], group: str, reference: Reference | None) -> Table:
    from nemo_ext.evaluate.table import STAGES

    paper = () if reference is None else (reference.name,)
    table = new_table(f"{title}: median±median absolute deviation over prompts", "what", *STAGES, *paper)
    table.columns[0].no_wrap = False
    cells = {(row.measure, row.stage): _cell(row) for row in rows}
    for measure in dict.fromkeys(row.measure for row in rows):
        published = () if reference is None else (_published(reference, group, measure),)
        table.add_row(measure, *(cells.get((measure, stage), "") for stage in STAGES), *published)
    return table


def _published(reference: Reference, group: str, measure: str) -> str:
    """The published values before and after: "0.83→0.09", or the second alone if only it is known."""
    digits = 0 if measure == "neurons off" else 2
    values = [reference.value(group, measure, stage) for stage in ("before", "after")]
    return "→".join(_with_deviation(one.value, one.deviation, digits) for one in values if one is not None)


def _cell(row: SummaryRow) -> str:
    if row.deviation is None:
        return f"{row.value:.0%}"
    # One prompt has no deviation.
    deviation = row.deviation if row.prompts > 1 else None
    return _with_deviation(row.value, deviation, 0 if row.measure in ("neurons off", "PDQ distance") else 2)


def _ordinary_table(found: OrdinaryEvaluation, short: str) -> Table:
    from nemo_ext.evaluate.table import median_and_deviation

    table = new_table(
        f"{found.prompts} ordinary prompts, one image each, with the union of all found neurons off",
        *("what", "before", "after", "control"),
    )
    table.columns[0].no_wrap = False
    table.add_row("neurons off", "0", str(found.neurons), str(found.control_neurons))
    if found.distance_after is not None and found.distance_control is not None:
        after, control = found.distance_after, found.distance_control
        biased = ", biased: few images" if after.images <= after.features else ""
        name = f"{found.frechet} to before (n = {after.images}{biased})"
        table.add_row(name, "", f"{after.frechet:.2f}", f"{control.frechet:.2f}")
        table.add_row(f"{found.kernel} to before", "", f"{after.kernel:.4f}", f"{control.kernel:.4f}")
    for name, *stages in (
        (f"{short}_gen", None, found.same_seed_after, found.same_seed_control),
        ("CLIP alignment", found.alignment_before, found.alignment_after, found.alignment_control),
    ):
        if stages[1] is not None:
            table.add_row(
                name, *("" if one is None else _with_deviation(*median_and_deviation(one), 2) for one in stages)
            )
    return table


def _detection_table(found: DetectionTable, reference: Reference | None) -> Table:
    table = new_table(
        f"Detection: {found.memorized} memorized and {found.ordinary} ordinary prompts, with 95 % intervals",
        *("what", "AUROC", "TPR at 1 % FPR", "U-Net samples"),
    )
    table.columns[0].no_wrap = False
    for row in found.rows:
        estimates = [
            "–" if one is None else f"{one.value:.3f} ({one.low:.2f}–{one.high:.2f})"
            for one in (row.auroc, row.tpr_at_1_percent_fpr)
        ]
        table.add_row(row.measured.detector.title, *estimates, str(row.measured.unet_samples))
    if reference is not None:
        table.add_row(
            f"NeMo's score, {reference.name}", *(f"{value:.3g}" for value in reference.detection.values()), ""
        )
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _with_deviation(value: float, deviation: float | None, digits: int) -> str:
    # A half is shown as a half: an even number of prompts can have a median of 2.5 neurons.
    shown = f"{value:g}" if digits == 0 else f"{value:.{digits}f}"
    if deviation is None:
        return shown
    return f"{shown}±{f'{deviation:g}' if digits == 0 else f'{deviation:.{digits}f}'}"
