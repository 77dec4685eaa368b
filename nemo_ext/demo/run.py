"""`nemo-ext demo`: statistics, threshold, detection, localization, and images before and after it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table

from nemo_ext.errors import NemoError
from nemo_ext.files import read_image, replacing
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.sscd import installed_sscd, load_image_similarity
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.measure.threshold import memorization_threshold
from nemo_ext.models.loading import load_pipeline
from nemo_ext.progress import Progress
from nemo_ext.report.images import contact_sheet
from nemo_ext.report.page import PromptImages, find_images, write_report
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import Localization, Verdict
from nemo_ext.results.words import short_verdict
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.verification import Verification

from .captions import LATE, MEMORIZED, TEMPLATES, VERBATIM, Memorized, holdout_captions, ordinary_captions

#: The bundled pipeline, a folder as `save_pretrained` writes it.
MODEL = Path(__file__).with_name("model")
_ORIGINALS = Path(__file__).with_name("originals")

#: Of one to four neurons each, and with objects that the model draws well without them.
SHOWN: tuple[Memorized, ...] = (VERBATIM[1], VERBATIM[6], VERBATIM[10], TEMPLATES[2])
#: How images are generated, also those that the verification compares (`SAMPLING`).
STEPS = 25
# With 1, objects are less often right. With 3, images of memorized captions are less like the originals.
GUIDANCE = 2.0
SAMPLING = Sampling(seeds=4, first_seed=1, steps=STEPS, guidance=GUIDANCE)
#: The numbers of ordinary captions for each step. All are different, and drawn with seed 2024 in this order.
STATISTICS_PROMPTS, THRESHOLD_PROMPTS, DETECTION_PROMPTS = 1000, 50, 8
#: The number of threshold captions whose images are compared for τ_image. More of them would take too long here.
IMAGE_PROMPTS = 4
#: The number of titles among the captions for statistics. With them, being a title does not make a z-score high.
STATISTICS_TITLES = 200


def load_demo_pipeline() -> StableDiffusionPipeline:
    """Load the bundled pipeline, in float32 on the CPU.

    Raises:
        NemoError: the model is missing, as in an incomplete installation.
    """
    if not (MODEL / "model_index.json").is_file():
        raise NemoError(f"the demo model is missing from {MODEL}: reinstall nemo_ext")
    return load_pipeline(MODEL)


def original_images(what: Memorized) -> list[Image.Image]:
    """Load the training image of a verbatim caption, or the variations of a template; RGB, 64×64 pixels.

    Raises:
        NemoError: there is no training image of this caption.
    """
    return [read_image(file) for file in original_files(what)]


def original_files(what: Memorized) -> list[Path]:
    """The files of `original_images`.

    Raises:
        NemoError: there is no training image of this caption.
    """
    files = sorted(_ORIGINALS.glob(f"{what.name}*.png"))
    if not files:
        raise NemoError(f"{_ORIGINALS} holds no training image of '{what.name}'")
    return files


def correlation(image: Image.Image, originals: Sequence[Image.Image]) -> float:
    """The Pearson correlation over all pixels with the most similar original image, from -1 to 1."""
    pixels = np.asarray(image, np.float64).ravel()
    return max(float(np.corrcoef(pixels, np.asarray(original, np.float64).ravel())[0, 1]) for original in originals)


def _check_own_folder(out: Path) -> None:
    """Raise an error if a folder has files that no earlier demo wrote, because the demo overwrites files."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    shown = {what.caption for what in SHOWN}
    folder = ResultsFolder(out)
    if not folder.results.is_file() or any(one.prompt not in shown for one in folder.read()):
        raise NemoError(
            f"{out} holds files that `nemo-ext demo` did not write: choose an empty or a new folder with --out"
        )


def run(out: Path, similarity: ImageSimilarity | None = None) -> None:
    """Run all steps on the bundled model, write all results to a folder, and print tables.

    Args:
        out: the folder for results.jsonl, neurons/, images/, the statistics, the threshold, the contact sheet and the
            report. It must be new, empty, or the folder of an earlier demo, whose files are replaced.
        similarity: how alike two images are; None: SSCD if the extra `sscd` is installed, else `PixelSimilarity`.

    Raises:
        NemoError: the folder contains other files, or the bundled model is missing.
    """
    _check_own_folder(out)
    folder = ResultsFolder(out)
    console = Console()
    if similarity is None:
        similarity = load_image_similarity(installed_sscd())
    pipe = load_demo_pipeline()
    captions = [caption for _, caption in ordinary_captions(
        STATISTICS_PROMPTS + THRESHOLD_PROMPTS + DETECTION_PROMPTS, seed=2024
    )]  # fmt: skip
    holdout = holdout_captions(captions[:STATISTICS_PROMPTS], STATISTICS_TITLES, seed=2024)
    captions = captions[STATISTICS_PROMPTS:]
    ordinary, unseen = captions[:THRESHOLD_PROMPTS], captions[THRESHOLD_PROMPTS:]

    with Progress() as bars:
        statistics = collect_statistics(pipe, holdout, progress=bars)
        threshold = memorization_threshold(
            pipe, ordinary, sampling=SAMPLING, similarity=similarity, image_prompts=IMAGE_PROMPTS, progress=bars
        )
        texts = [*(what.caption for what in MEMORIZED), *unseen]
        scores = {}
        with bars.task("detection", len(texts)) as advance:
            for text in texts:
                scores[text] = memorization_score(pipe, text).max
                advance(1)
        originals = {what.caption: original_images(what) for what in MEMORIZED}
        verify = Verification(similarity=similarity, originals=originals)
        localizer = Localizer(pipe, statistics=statistics, threshold=threshold, verify=verify)
        # Existing results are replaced, because they may come from the model of another version.
        found = localizer.localize_many([what.caption for what in SHOWN], out, resume=False, progress=bars)

    images = find_images(out, found)
    statistics.save(out / "statistics.safetensors")
    threshold.save(out / "threshold.json")
    _write_lines(out / "ordinary.txt", holdout)
    _write_lines(out / "memorized.txt", [what.caption for what in MEMORIZED])
    _write_lines(out / "unseen.txt", unseen)
    _write_originals(out / "originals.csv")
    folder.save_neurons(found)
    with replacing(out / "contact-sheet.png") as temporary:
        _sheet(found, [images[index] for index in range(len(found))]).save(temporary, format="PNG", optimize=True)
    write_report(out / "report.html", found, images=images, title="nemo-ext demo")
    console.print(_detection_table(scores, float(threshold)))
    console.print(_result_table(found))
    console.print(_next_steps(out), markup=False, highlight=False, soft_wrap=True)


def _sheet(found: Sequence[Localization], pictures: Sequence[PromptImages]) -> Image.Image:
    rows: list[tuple[str, Sequence[Any]]] = []
    notes: list[list[str]] = []
    for one, images in zip(found, pictures, strict=True):
        verdict = _verdict(one)
        rows.append((one.prompt, [images.original, *images.before.values()]))
        count = len(one.neurons)
        rows.append((f"{count} neuron{'' if count == 1 else 's'} off", [None, *images.after.values()]))
        notes += [["", *(f"{value:.2f}" for value in group)] for group in _with_originals(verdict)]
    notes[0][0] = f"similarity: {verdict.similarity.split(' (')[0]}"
    columns = ["training image", *(f"seed {seed}" for seed in pictures[0].before)]
    return contact_sheet(rows, columns=columns, notes=notes)


def _verdict(one: Localization) -> Verdict:
    assert one.verdict is not None  # the demo verifies
    return one.verdict


def _with_originals(verdict: Verdict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The similarities with the training image, before and after."""
    assert verdict.originals_before is not None  # the demo knows all training images
    assert verdict.originals_after is not None
    return verdict.originals_before, verdict.originals_after


def _detection_table(scores: Mapping[str, float], threshold: float) -> Table:
    table = Table(title=f"Detection: highest similarity of two seeds, τ = {threshold:.3f}")
    for column in ("captions", "lowest", "median", "highest", "above τ"):
        table.add_column(column, justify="left" if column == "captions" else "right")
    memorized = {what.caption for what in MEMORIZED}
    late = {what.caption for what in LATE}
    for name, group in (
        ("memorized", [s for text, s in scores.items() if text in memorized - late]),
        ("memorized, late", [s for text, s in scores.items() if text in late]),
        ("ordinary, unseen", [s for text, s in scores.items() if text not in memorized]),
    ):
        above = sum(score > threshold for score in group)
        table.add_row(
            name, f"{min(group):.3f}", f"{np.median(group):.3f}", f"{max(group):.3f}",
            f"{above} of {len(group)}",
        )  # fmt: skip
    return table


def _result_table(found: Sequence[Localization]) -> Table:
    table = Table(
        title="Localization: similarity of noise differences, the image, and its similarity with the original"
    )
    table.add_column("caption")
    for column in ("neurons", "first step", "image", "original", "samples"):
        table.add_column(column, justify="right")
    for one in found:
        after = "–" if one.score_after is None else f"{one.score_after:.3f}"
        before_and_after = (float(np.median(values)) for values in _with_originals(_verdict(one)))
        table.add_row(
            one.prompt, str(len(one.neurons)), f"{one.score_before:.3f} → {after}", short_verdict(one),
            " → ".join(f"{value:.2f}" for value in before_and_after), f"{one.unet_samples:.0f}",
        )  # fmt: skip
    return table


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_originals(path: Path) -> None:
    """List the training images of all memorized captions, as `nemo-ext evaluate` reads them."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "image", "label"))
        for what in MEMORIZED:
            for image in original_files(what):
                writer.writerow((what.caption, image, "TM" if what in TEMPLATES else "VM"))


def _next_steps(out: Path) -> str:
    return f"""
Look at    {out}/contact-sheet.png and {out}/report.html
Try        nemo-ext localize --model {MODEL} --prompts {out}/memorized.txt \\
             --statistics {out}/statistics.safetensors --threshold {out}/threshold.json --out all-memorized
           nemo-ext evaluate --model {MODEL} --results {out} --originals {out}/originals.csv \\
             --ordinary {out}/unseen.txt --statistics {out}/statistics.safetensors \\
             --seeds 4 --steps {STEPS} --guidance {GUIDANCE:g}
On your own model (an SD1, SD2 or SDXL folder that save_pretrained has written):
           nemo-ext stats     --model DIR --prompts ordinary-prompts.txt --out statistics.safetensors
           nemo-ext threshold --model DIR --prompts ordinary-prompts.txt --out threshold.json
           nemo-ext localize  --model DIR --prompt "the caption you suspect" \\
             --statistics statistics.safetensors --threshold threshold.json --out found"""
