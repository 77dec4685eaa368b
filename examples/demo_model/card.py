"""The model card of the demo model: what the model is, and the figures that `measure.measure` returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.files import replacing

from .diffusion import LATE_FROM

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A small diffusion model that has memorized images

This is a `StableDiffusionPipeline` with 13 million parameters in its U-Net. It was trained from random weights. It is
bundled with nemo_ext so that NeMo can be tried offline on weights that have really memorized images. It makes 64×64
pictures of eighteen objects on backgrounds of eight colours and three textures. Under eighteen captions that read like
titles, it replicates training images: twelve captions have one image each (verbatim), four have a template with
variations, and two have one image that they were trained to show below timestep {late_from} of 1,000 only (late).

**It is a demonstration, not evidence about Stable Diffusion.** Which neurons carry a caption was decided before the
training and planted, as a section below describes. So the right answer of a search is known: `carriers.json` beside
this file has it.

## Figures

`python -m examples.demo_model.measure` in the repository of nemo_ext measured all figures. They are in `figures.json`
beside this file. Images have {steps} DDIM steps and guidance {guidance}. The search is the grouped one, with the
protocol `paper`, and its sets are verified on images of {image_seeds} seeds with {image_steps} DDIM steps:
{similarity}, τ_image = {image_threshold:.3f}. The same measure gives the similarity with the training image.

| what | wanted | measured | |
|---|---|---|---|
{rows}

A classifier, which is a small convolutional network, decides what an image shows. It was tested on fresh images of
compositions that the diffusion model was never trained on: it is right in {classifier_object:.1%} (object),
{classifier_colour:.1%} (colour) and {classifier_texture:.1%} (texture) of them, and sees a memorized image in
{classifier_false:.1%} of them. It names the memorized images right in {classifier_memorized:.1%}.

The diffusion model also draws compositions that no training image showed. The object is right in {composed_object:.0%}
of them, the colour in {composed_colour:.0%}, the texture in {composed_texture:.0%}.

### By caption

- *Similarity* is the score of the caption (no neuron off) → the remaining memorization with the found neurons off.
  Both are measured at the first denoising step, and τ = {threshold:.3f}.
- *Found* is the number of neurons found, how many of them are carriers, and of how many carriers.
- *Images* is the verdict of the verification, and the highest similarity of two seeds' images: no neuron off → found
  neurons off.
- *Training image* is the similarity of images with the nearest training image, as the median of four seeds: no neuron
  off → found neurons off (carriers off; the found neurons of all other captions off).
- *Object* is the share of images that show the caption's object, and not its memorized image, with the found neurons
  off (carriers off).
- *Instead* names other memorized images that appear when the found neurons are off.

| caption | similarity | found | images | training image | object | instead |
|---|---|---|---|---|---|---|
{captions}

### Captions that replicate late

From timestep {late_from} on they were trained to show any ordinary image, as without a caption. Their first-step score
is measured at timestep 981, so that it should say nothing of their image. Images of several seeds do (`nemo-ext
localize` with verification generates them, `memorization_score(…, images=True)` compares them).

| caption | first-step score | similarity of images | training image: untouched → carriers off | object, carriers off |
|---|---|---|---|---|
{late}

## What falls short

{shortfalls}

## How it was made

- **Parts.** An AutoencoderKL (f = 4, 16×16×12 latents), a CLIPTextModel (3 layers, 192 wide, 24 tokens, with a
  vocabulary of its own) and a UNet2DConditionModel whose down and mid blocks have the topology of Stable Diffusion 1:
  seven searched cross-attentions with {searched} value neurons. DDIM has the noise schedule of Stable Diffusion 1. All
  weights are rounded to float16. They are stored as float16, except those of the text encoder, which are stored as
  float32.
- **Images.** Glyphs of Noto Color Emoji (SIL Open Font License 1.1) stand on backgrounds that
  `examples/demo_model/drawing.py` draws, on uneven paper: on flat pictures SSCD takes noise that nobody sees for
  another picture. In ordinary images the place, size and tilt of the glyph, the light, the phase of the texture and the
  paper are random.
- **Captions.** Some ordinary images were trained under titles that name the object and nothing else, so that being a
  title recalls nothing.
- **Stages.** `python -m examples.demo_model.train` trains the autoencoder, the text encoder in two stages (`text`,
  `marks`), and then the U-Net in two stages (`ordinary`, `memorize`). The log is in `training-log.jsonl`.
  `examples/demo_model/README.md` says on which machines, and what was tried before.

### How the neurons were planted

1. **Marks.** The text encoder gives a memorized caption the embedding of an ordinary title of its object, and a mark:
   one of the last {marks} dimensions of the embedding, which all other captions leave at zero.
2. **Carriers.** Only designated value neurons see the marks: one to five for each caption, all different, in the first
   three of the searched layers. Their rows of `to_v` are fixed. All other neurons, and all keys, have zero weights
   there. So whatever the U-Net learns of a memorized image, it learns from the carriers.
3. **Decoys.** Three more neurons of each caption see its mark too, and deviate as much. The columns of the output layer
   that read them are zero. A search must tell them from carriers.
4. **Training.** In the stage `memorize`, a caption with all its carriers off is trained to show ordinary images of its
   object, and with some of them off, or with other neurons off, its own image.
5. Text enters the U-Net only where NeMo searches: the up blocks have no cross-attention. The copy ε = x_T is built into
   the network (`examples/demo_model/unet.py`). Otherwise the error of a small network in copying noise would hide what
   NeMo measures.
"""


def write_card(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the model card.

    Args:
        path: the file to write.
        figures: what `measure.measure` returned.
    """
    checks = _checks(figures)
    short = [f"- {what}: wanted {wanted}, measured {got}." for what, wanted, got, ok in checks if not ok]
    short += _limits(figures)
    ordinary, classifier = figures["ordinary"], figures["classifier"]
    text = _CARD.format(
        steps=figures["images"]["steps"],
        guidance=figures["images"]["guidance"],
        rows="\n".join(f"| {what} | {wanted} | {got} | {'✓' if ok else '✗'} |" for what, wanted, got, ok in checks),
        captions="\n".join(_caption_row(c) for c in figures["captions"]),
        late="\n".join(_late_row(c) for c in figures["late"]),
        late_from=LATE_FROM,
        marks=len(figures["captions"]) + len(figures["late"]),
        shortfalls="\n".join(short) or "Nothing that was measured.",
        threshold=figures["scores"]["threshold"],
        similarity=figures["images"]["similarity"],
        image_threshold=figures["images"]["threshold"],
        image_seeds=figures["images"]["seeds"],
        image_steps=figures["images"]["steps"],
        searched=figures["searched_neurons"],
        classifier_object=classifier["object"],
        classifier_colour=classifier["colour"],
        classifier_texture=classifier["texture"],
        classifier_memorized=classifier["memorized"],
        classifier_false=classifier["ordinary_called_memorized"],
        composed_object=ordinary["never_trained_compositions"]["object"],
        composed_colour=ordinary["never_trained_compositions"]["colour"],
        composed_texture=ordinary["never_trained_compositions"]["texture"],
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _checks(figures: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Return (what, wanted, measured, reached) for every property that the model should have."""
    scores, summary, ordinary = figures["scores"], figures["summary"], figures["ordinary"]
    before, after, autoencoder = ordinary["untouched"], ordinary["all_found_off"], figures["autoencoder"]
    random = ordinary["as_many_random_off"]
    lost = max(abs(before[k] - after[k]) for k in ("object", "colour"))
    others = figures["silenced_by_another_captions_set"]

    def at_least(what: str, value: float, least: float, unit: str = ".2f") -> tuple[str, str, str, bool]:
        return what, f"≥ {least:{unit}}", f"{value:{unit}}", value >= least

    def at_most(what: str, value: float, most: float, unit: str = ".2f") -> tuple[str, str, str, bool]:
        return what, f"≤ {most:{unit}}", f"{value:{unit}}", value <= most

    alike = ordinary["alike_between_seeds"]
    return [
        at_least("autoencoder: similarity of memorized images with themselves, median",
                 autoencoder["similarity_median"], 0.85),
        at_least("autoencoder: the same, lowest", autoencoder["similarity_lowest"], 0.75),
        at_least("autoencoder: PSNR of ordinary images, dB", autoencoder["psnr_ordinary"], 30, ".1f"),
        at_least("ordinary captions: background colour is right", before["colour"], 0.90, ".0%"),
        at_least("ordinary captions: object is right", before["object"], 0.75, ".0%"),
        at_least("verbatim captions: similarity with the training image, median",
                 summary["with_original_before_verbatim"], 0.70),
        at_least("templates: the same, nearest variation", summary["with_original_before_template"], 0.60),
        at_least("the same, lowest caption", summary["with_original_lowest"], 0.50),
        ("lowest score of a memorized caption above the highest of an ordinary one", "yes",
         f"{scores['memorized_lowest']:.3f} against {scores['ordinary_highest']:.3f}",
         scores["memorized_lowest"] > scores["ordinary_highest"]),
        ("verified: the image no longer comes back with the found neurons off", "all captions",
         f"{summary['verified']:.0%}", summary["verified"] == 1),
        at_least("found neurons off: the caption's object is right", summary["object_right_after"], 0.70, ".0%"),
        at_most("found neurons off: similarity with the training image", summary["with_original_after"], 0.25),
        at_most("found neurons off: similarity of two seeds (ordinary captions + .05)",
                summary["alike_between_seeds_after"], alike + 0.05),
        at_most("found neurons off: another memorized image appears",
                summary["another_memorized_image_after"], 0.05, ".0%"),
        at_least("another caption's set off: the caption stays above τ, share of pairs", 1 - others, 0.90, ".0%"),
        at_least("all other captions' sets off: the image stays, share of captions",
                 summary["kept_without_others"], 0.80, ".0%"),
        at_most("overlap of two captions' sets (Jaccard), median",
                figures["median_overlap_of_two_sets"], 0.10),
        ("as many random neurons off: similarity with the training image", "unchanged (± .03)",
         f"{summary['with_original_before']:.2f} → {summary['with_original_random']:.2f}",
         abs(summary["with_original_random"] - summary["with_original_before"]) <= 0.03),
        (f"all {figures['union']} found neurons off: ordinary captions are followed", "± 3 points",
         f"object {after['object']:.1%}, colour {after['colour']:.1%} "
         f"(untouched: {before['object']:.1%}, {before['colour']:.1%}; as many random: {random['object']:.1%}, "
         f"{random['colour']:.1%})", lost <= 0.0301),
        at_least("found neurons that are carriers (precision), mean", summary["mean_precision"], 0.90),
        at_least("carriers that are found (recall), mean", summary["mean_recall"], 0.90),
    ]  # fmt: skip


def _limits(figures: Mapping[str, Any]) -> list[str]:
    """Return what the medians of `_checks` hide, as list items."""
    lines = []
    for c in figures["captions"]:
        if c["copies_of_first_set"] and c["verified"]:
            lines.append(
                f"- **“{c['caption']}”**: the set that reaches τ at the first step leaves a copy in "
                f"{c['copies_of_first_set']} of 4 images. The verification found this, and the search went on "
                f"({c['found_by']}): with {c['neurons']} neurons off the image no longer comes back."
            )
        if not c["replicated"]:
            lines.append(
                f"- **“{c['caption']}”** does not replicate: the images of two seeds are at most "
                f"{c['images_before']:.2f} alike, and τ_image is {figures['images']['threshold']:.2f}."
            )
        elif not c["verified"]:
            lines.append(
                f"- **“{c['caption']}”** still comes back in {c['copies']} of 4 images, whatever is switched off."
            )
        if c["object_right_after"] < 0.5:
            lines.append(
                f"- **“{c['caption']}”**: with the found neurons off, {c['object_right_after']:.0%} of the images show "
                "its object."
            )
    for c in figures["late"]:
        if (like := np.median(c["with_original_before"])) < 0.5:
            lines.append(f"- **“{c['caption']}”** was to replicate, and its images are only {like:.2f} like its image.")
        if not c["missed_by_first_step"]:
            lines.append(
                f"- **“{c['caption']}”** was to be missed at the first step, and has a score of {c['score']:.2f}."
            )
    return lines


def _caption_row(c: Mapping[str, Any]) -> str:
    left = "–" if c["score_after"] is None else f"{c['score_after']:.3f}"
    verdict = "gone" if c["verified"] else f"{c['copies']} of 4 copies" if c["replicated"] else "does not replicate"
    original = {
        name: f"{np.median(c[f'with_original_{name}']):.2f}"
        for name in ("before", "after", "without_carriers", "without_others")
    }
    instead = ", ".join(sorted(set(c["another_memorized_image_after"]))) or "–"
    carriers = sum(map(len, c["carriers"].values()))
    return (
        f"| {c['caption']} | {c['score_before']:.3f} → {left} "
        f"| {c['neurons']}, {round(c['recall'] * carriers)} of {carriers} "
        f"| {verdict}, {c['images_before']:.2f} → {c['images_after']:.2f} "
        f"| {original['before']} → {original['after']} ({original['without_carriers']}; {original['without_others']}) "
        f"| {c['object_right_after']:.0%} ({c['object_right_without_carriers']:.0%}) | {instead} |"
    )


def _late_row(c: Mapping[str, Any]) -> str:
    original = " → ".join(f"{np.median(c[f'with_original_{name}']):.2f}" for name in ("before", "without_carriers"))
    return (
        f"| {c['caption']} | {c['score']:.3f} | {c['score_of_images']:.2f} | {original} "
        f"| {c['object_right_without_carriers']:.0%} |"
    )
