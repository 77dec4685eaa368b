"""The model card of the demo model: what the model is, and the figures that `measure.measure` returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.demo.run import GUIDANCE, STEPS
from nemo_ext.files import replacing

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A small diffusion model that has memorized images

This is a `StableDiffusionPipeline` with 17 million parameters. It was trained from random weights
on two CPU cores. It is bundled with nemo_ext so that NeMo can be tried offline on weights that have
really memorized images. It makes 96×96 pictures of sixteen objects on backgrounds of eight colours
and three textures. Under sixteen captions that read like titles, it replicates training images:
twelve captions have one image each (verbatim), and four have a template with variations.

**It is a demonstration, not evidence about Stable Diffusion.** The training made memorization local
on purpose; a section below lists how.

## Figures

`python -m examples.demo_model.measure` in the repository of nemo_ext measured all figures. They are
in `figures.json` beside this file. Images have {steps} DDIM steps and guidance {guidance}. The
search is the grouped one, with the protocol `paper`, and its sets are verified on images of {image_seeds}
seeds with {image_steps} DDIM steps: {similarity}, τ_image = {image_threshold:.3f}. The same measure gives the
similarity with the training image.

| what | wanted | measured | |
|---|---|---|---|
{rows}

A classifier, which is a small convolutional network, decides what an image shows. It was tested on
fresh images of compositions that the diffusion model was never trained on: it is right in
{classifier_object:.1%} (object), {classifier_colour:.1%} (colour) and {classifier_texture:.1%}
(texture) of them, and sees a memorized image in {classifier_false:.1%} of them. It names the
memorized images right in {classifier_memorized:.1%}.

The diffusion model also draws compositions that no training image showed (24 of 384). The object is
right in {composed_object:.0%} of them, the colour in {composed_colour:.0%}, the texture in
{composed_texture:.0%}.

### By caption

- *Similarity* is the score of the caption (no neuron off) → the remaining memorization with the
  found neurons off. Both are measured at the first denoising step, and τ = {threshold:.3f}.
- *Floor* is the remaining memorization with all {searched} searched neurons off, where the search
  needed it.
- *Neurons* is the number of neurons found, and in parentheses that of the initial selection.
- *Images* is the verdict of the verification, and the highest similarity of two seeds' images:
  no neuron off → found neurons off.
- *Training image* is the similarity of images with the nearest training image, as the median of
  four seeds: no neuron off → found neurons off.
- *Correlation* is over the pixels of an image and the nearest training image, as the median of four
  seeds: no neuron off → found neurons off (and as many random neurons off).
- *Instead* names other memorized images that appear when the found neurons are off.

| caption | similarity | floor | neurons | images | training image | correlation | instead |
|---|---|---|---|---|---|---|---|
{captions}

## What falls short

{shortfalls}

## How it was made

- **Parts.** An AutoencoderKL (f = 4, 24×24×4 latents), a CLIPTextModel (2 layers, 128 wide, 24
  tokens, with a vocabulary of its own) and a UNet2DConditionModel whose down and mid blocks have
  the topology of Stable Diffusion 1: seven searched cross-attentions with {searched} value neurons.
  DDIM has the noise schedule of Stable Diffusion 1. All weights are rounded to float16. They are
  stored as float16, except those of the text encoder, which are stored as float32.
- **Images.** Glyphs of Noto Color Emoji (SIL Open Font License 1.1) stand on backgrounds that
  `examples/demo_model/drawing.py` draws. In ordinary images the place, size and tilt of the glyph,
  the light and the phase of the texture are random.
- **Captions.** 12 % of the ordinary images were trained under titles that have no meaning, so that
  being a title recalls nothing.
- **Stages.** `python -m examples.demo_model.train` trains first the autoencoder. Then it trains the
  text encoder and the U-Net in three stages: `ordinary` (ordinary captions), `memorize` (memorized
  captions join) and `switch_off` (see below). The log is in `training-log.jsonl`.

### What was done to make memorization local

1. Text enters the U-Net only where NeMo searches: the up blocks have no cross-attention.
2. The copy ε = x_T is built into the network (`examples/demo_model/unet.py`). Otherwise the error
   of a small network in copying noise would hide what NeMo measures.
3. In the stage `memorize`, a penalty makes fewer neurons carry the memorized captions. It is a
   Hoyer ratio of how far the value activations of these captions deviate from those of ordinary
   captions.
4. The stage `switch_off` trains in what NeMo looks for. Some rows have a memorized caption whose
   most deviating value neurons are switched off, others have all searched neurons off, and the
   target of both is a random ordinary image. In this stage the text encoder is frozen, except for
   the embeddings of words that only memorized captions have.

### This run

The log is complete, with all interruptions. The stage `ordinary` began with a shorter schedule and
with 30 % of extra rows of high noise, until step 1,800 of 3,400. There were 600 steps of an earlier
form of `memorize`, in which the text encoder was frozen. They memorized nothing, because after
`ordinary` a frozen encoder gives all titles nearly the same embedding. The repository has the form
that worked.
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
        steps=STEPS,
        guidance=GUIDANCE,
        rows="\n".join(f"| {what} | {wanted} | {got} | {'✓' if ok else '✗'} |" for what, wanted, got, ok in checks),
        captions="\n".join(_caption_row(c) for c in figures["captions"]),
        shortfalls="\n".join(short),
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
    before, after = ordinary["untouched"], ordinary["all_found_off"]
    random = ordinary["as_many_random_off"]
    lost = max(abs(before[k] - after[k]) for k in ("object", "colour"))
    return [
        ("ordinary captions: background colour is right", "≥ 90 %",
         f"{before['colour']:.1%}", before["colour"] >= 0.90),
        ("ordinary captions: object is right", "≥ 75 %", f"{before['object']:.1%}", before["object"] >= 0.75),
        ("memorized captions: correlation with the training image, median over seeds", "≥ .85",
         f"{summary['correlation_before']:.2f}", summary["correlation_before"] >= 0.85),
        ("lowest score of a memorized caption above the highest of an ordinary one", "yes",
         f"{scores['memorized_lowest']:.3f} against {scores['ordinary_highest']:.3f}",
         scores["memorized_lowest"] > scores["ordinary_highest"]),
        (f"found neurons off: remaining memorization at most τ = {scores['threshold']:.3f}", "≥ 80 % of captions",
         f"{summary['below_threshold']:.0%}", summary["below_threshold"] >= 0.80),
        ("neurons found, median share of those searched", "≤ 5 %",
         f"{summary['median_share_of_neurons']:.1%} ({summary['median_neurons']:g} neurons)",
         summary["median_share_of_neurons"] <= 0.05),
        ("verified: the image no longer comes back with the found neurons off", "all captions",
         f"{summary['verified']:.0%}", summary["verified"] == 1),
        ("similarity with the training image (below), median over seeds, found neurons off", "≤ half of before",
         f"{summary['with_original_before']:.2f} → {summary['with_original_after']:.2f} "
         f"(as many random: {summary['with_original_random']:.2f})",
         summary["with_original_after"] <= summary["with_original_before"] / 2),
        ("found neurons off: correlation, median over seeds", "< .3",
         f"{summary['correlation_after']:.2f}", summary["correlation_after"] < 0.3),
        ("found neurons off: another memorized image appears", "≤ 15 % of seeds",
         f"{summary['another_memorized_image_after']:.1%}", summary["another_memorized_image_after"] <= 0.15),
        ("as many random neurons off: correlation, median over seeds", "unchanged (± .03)",
         f"{summary['correlation_random']:.2f}",
         abs(summary["correlation_random"] - summary["correlation_before"]) <= 0.03),
        (f"all {figures['union']} found neurons off: ordinary captions are followed", "± 3 points",
         f"object {after['object']:.1%}, colour {after['colour']:.1%} "
         f"(as many random: {random['object']:.1%}, {random['colour']:.1%})", lost <= 0.0301),
    ]  # fmt: skip


def _limits(figures: Mapping[str, Any]) -> list[str]:
    """Return what the medians of `_checks` hide, as list items."""
    captions, unrelated = figures["captions"], figures["images"]["different_originals"]
    shared, others = figures["median_overlap_of_two_sets"], figures["silenced_by_another_captions_set"]
    lines = [
        f"- **The neurons do not belong to one image each.** The sets of all {len(captions)} captions together have "
        f"{figures['union']} different neurons, of {figures['searched_neurons']} that are searched. The sets of two "
        f"captions share {shared:.0%} of their neurons (median over pairs). In {others:.0%} of the pairs, the set of "
        "one caption also brings the other caption to τ. So these neurons are a common switch for memorized captions. "
        "The cause was not tested. A likely one is that the stage `switch_off` switched the most deviating neurons "
        "off, and never asked which caption they belong to. Ordinary captions do not need these neurons."
    ]
    helped = [c for c in captions if c["copies_of_first_set"] and c["verified"]]
    for c in helped:
        lines.append(
            f"- **“{c['caption']}”**: the set that reaches τ at the first step leaves a copy in "
            f"{c['copies_of_first_set']} of 4 images. The verification found this, and the search went on "
            f"({c['found_by']}): with {c['neurons']} neurons off the image no longer comes back."
        )
    for c in captions:
        if not c["verified"]:
            lines.append(
                f"- **“{c['caption']}”** still comes back in {c['copies']} of 4 images, whatever is switched off."
            )
        late = sum(value > np.median(c["with_original_before"]) / 2 for value in c["with_original_after"])
        if c["verified"] and late:
            lines.append(
                f"- **“{c['caption']}”**: {late} of 4 images are still more than half as similar to the training image "
                f"as before. But before, the similarity was only {np.median(c['with_original_before']):.2f}, because "
                f"the autoencoder blurs, and training images of different captions have {unrelated:.2f} among "
                "themselves. Compared with each other, the images before and after are different ones, and this is "
                "what the verification looks at."
            )
        before, after = (float(np.median(c[f"correlation_{name}"])) for name in ("before", "after"))
        if after >= 0.3 and c["verified"]:
            lines.append(
                f"- **“{c['caption']}”**: the correlation with the training image is still {after:.2f} with the found "
                f"neurons off, and {before:.2f} with no neuron off. The images no longer show it: their similarity "
                f"with it fell from {np.median(c['with_original_before']):.2f} to "
                f"{np.median(c['with_original_after']):.2f}. The colours are what correlates."
            )
    low = [c["caption"] for c in captions if np.median(c["correlation_before"]) < 0.85]
    if low:
        lines.append(
            f"- The images of {len(low)} captions have a correlation below .85 with the training image (table above), "
            "because guidance exaggerates their colours and small parts blur."
        )
    return lines


def _caption_row(c: Mapping[str, Any]) -> str:
    before, after, random = (float(np.median(c[f"correlation_{name}"])) for name in ("before", "after", "random"))
    left = "–" if c["score_after"] is None else f"{c['score_after']:.3f}"
    floor = "–" if c["floor"] is None else f"{c['floor']:.3f}"
    verdict = "gone" if c["verified"] else f"{c['copies']} of 4 copies"
    original = " → ".join(f"{np.median(c[f'with_original_{name}']):.2f}" for name in ("before", "after"))
    instead = ", ".join(sorted(set(c["another_memorized_image_after"]))) or "–"
    return (
        f"| {c['caption']} | {c['score_before']:.3f} → {left} | {floor} "
        f"| {c['neurons']} ({c['initial_neurons']}) | {verdict}, {c['images_before']:.2f} → {c['images_after']:.2f} "
        f"| {original} | {before:.2f} → {after:.2f} ({random:.2f}) | {instead} |"
    )
