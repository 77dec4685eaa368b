"""Measures the figures of the model card: `python -m examples.demo_model.measure --model DIR --out CARD`.

It writes the figures to CARD/figures.json and the model card to CARD/README.md. At first it trains a small classifier.
The font Noto Color Emoji must be installed, as for training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nemo_ext.demo.captions import (
    LATE,
    MEMORIZED,
    OBJECTS,
    TEMPLATES,
    Memorized,
    Ordinary,
    holdout_captions,
    ordinary_captions,
)
from nemo_ext.demo.planted import Planted, planted_neurons
from nemo_ext.demo.run import SAMPLING, STATISTICS_PROMPTS, STATISTICS_TITLES, correlation
from nemo_ext.files import replacing
from nemo_ext.measure.generation import generate_images
from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.sscd import load_image_similarity
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.measure.threshold import memorization_threshold
from nemo_ext.models.layers import value_layers
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.state import model_fingerprint
from nemo_ext.models.text import encode_prompts
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patch_handle, patched
from nemo_ext.progress import Progress
from nemo_ext.results.record import Localization, Verdict
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.probe import NoiseProbe
from nemo_ext.search.runs import Runs
from nemo_ext.search.verification import Verification

from .autoencoder import psnr
from .card import write_card
from .classifier import ANSWERS, NONE, Classifier, classify, labels_of, through, train_classifier
from .data import memorized_images, ordinary_pool_sample, originals_of, split_compositions

_SEEDS = SAMPLING.seeds
_ORDINARY_IMAGES = 64
_DIVERSITY_CAPTIONS = 8
_THRESHOLD_PROMPTS = 150


def random_neurons(pipe: StableDiffusionPipeline, like: NeuronSet, seed: int) -> NeuronSet:
    """Draw random searched neurons: in each layer as many as `like` has, and none that `like` has."""
    rng = random.Random(seed)
    layers = value_layers(pipe)
    return NeuronSet(
        {
            layer: rng.sample(sorted(set(range(layers[layer].out_features)) - set(own)), len(own))
            for layer, own in like.items()
        }
    )


def _generate(pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Generate one image for each pair of a prompt and a seed, as `SAMPLING` says."""
    guidance = SAMPLING.resolved(pipe).guidance
    assert guidance is not None
    return generate_images(pipe, prompts, seeds, steps=SAMPLING.steps, guidance=guidance, batch_size=8)


@dataclass(frozen=True)
class _Bench:
    """The pipeline, the classifier and the progress bars, which every measurement needs."""

    pipe: StableDiffusionPipeline
    classifier: Classifier
    bars: Progress

    def images(self, name: str, captions: Sequence[str], neurons: NeuronSet | None = None) -> list[Image.Image]:
        """Generate `_SEEDS` images of each caption with `neurons` off; the images of one caption follow each other."""
        prompts = [c for c in captions for _ in range(_SEEDS)]
        seeds = [*range(1, _SEEDS + 1)] * len(captions)
        with self.bars.task(name, 1) as advance, patched(self.pipe, neurons or NeuronSet()):
            made = _generate(self.pipe, prompts, seeds)
            advance(1)
        return made

    def obeyed(self, name: str, what: Sequence[tuple[Ordinary, str]], neurons: NeuronSet) -> dict[str, float]:
        """Return the share of ordinary images, one for each caption, that show what their caption says."""
        with self.bars.task(name, 1), patched(self.pipe, neurons):
            made = _generate(self.pipe, [c for _, c in what], range(101, 101 + len(what)))
        got = classify(self.classifier, made)
        wanted = torch.tensor([labels_of(w) for w, _ in what])
        return {
            **{k: float((got[:, i] == wanted[:, i]).float().mean()) for i, k in enumerate(ANSWERS) if k != "memorized"},
            "shows_a_memorized_image": float((got[:, 3] != NONE).float().mean()),
        }


def measure(
    pipe: StableDiffusionPipeline, planted: dict[str, Planted], similarity: ImageSimilarity, bars: Progress
) -> dict[str, Any]:
    """Return every figure of the model card, as written to figures.json.

    Args:
        pipe: the pipeline.
        planted: the designated neurons of each memorized caption.
        similarity: how alike two images are, for the verification and for the similarity with the training image.
        bars: the progress bars.
    """
    classifier, accuracy = train_classifier(pipe, bars)
    bench = _Bench(pipe, classifier, bars)
    drawn = ordinary_captions(STATISTICS_PROMPTS + _THRESHOLD_PROMPTS + _ORDINARY_IMAGES, seed=2024)
    holdout = holdout_captions([c for _, c in drawn[:STATISTICS_PROMPTS]], STATISTICS_TITLES, seed=2024)
    rest = drawn[STATISTICS_PROMPTS:]
    ordinary, shown = rest[:_THRESHOLD_PROMPTS], rest[_THRESHOLD_PROMPTS:]
    _, never_seen = split_compositions()
    composed = [(w, w.caption("a photo of a {object} on a {texture} {colour} background")) for w in never_seen]

    statistics = collect_statistics(pipe, holdout, progress=bars)
    threshold = memorization_threshold(
        pipe, [c for _, c in ordinary], sampling=SAMPLING, similarity=similarity, progress=bars
    )
    assert threshold.images is not None
    early = [m for m in MEMORIZED if m not in LATE]
    memorized_scores = _scores(pipe, [m.caption for m in early], bars)
    # The verification is not given the training images, because a user rarely has them.
    localizer = Localizer(pipe, statistics=statistics, threshold=threshold, verify=Verification(similarity=similarity))
    found = localizer.localize_many([m.caption for m in early], progress=bars)
    union = NeuronSet()
    for one in found:
        union |= one.neurons
    captions = [
        _caption(bench, similarity, what, one, planted[what.caption], union)
        for what, one in zip(early, found, strict=True)
    ]
    searched = sum(layer.out_features for layer in value_layers(pipe).values())
    nothing = NeuronSet()
    return {
        "model": model_fingerprint(pipe),
        "searched_neurons": searched,
        "autoencoder": _autoencoder(pipe, similarity),
        "classifier": accuracy,
        "ordinary": {
            "untouched": bench.obeyed("ordinary", shown, nothing),
            "never_trained_compositions": bench.obeyed("compositions", composed, nothing),
            "all_found_off": bench.obeyed("ordinary, found off", shown, union),
            "as_many_random_off": bench.obeyed("ordinary, random off", shown, random_neurons(pipe, union, 5)),
            "alike_between_seeds": _alike(
                similarity, bench.images("diversity", [c for _, c in shown[:_DIVERSITY_CAPTIONS]])
            ),
        },
        "scores": {
            "threshold": threshold.value,
            "ordinary_mean": threshold.mean,
            "ordinary_highest": max(threshold.scores),
            "memorized_lowest": min(memorized_scores),
            "memorized_median": float(np.median(memorized_scores)),
        },
        "images": {
            "similarity": threshold.images.similarity,
            "threshold": threshold.images.value,
            "ordinary_highest": max(threshold.images.scores),
            "different_originals": different_originals(similarity),
            **SAMPLING.to_dict(),
        },
        "union": len(union),
        "median_overlap_of_two_sets": _overlap([one.neurons for one in found]),
        "silenced_by_another_captions_set": silenced_by_others(pipe, found, bars),
        "captions": captions,
        "late": [_late(bench, similarity, what, planted[what.caption], threshold.value) for what in LATE],
        "summary": _summary(captions, searched),
    }


def different_originals(similarity: ImageSimilarity) -> float:
    """Return the mean similarity of two training images of different captions, the first one of each caption."""
    described = similarity.describe([originals_of(what)[0] for what in MEMORIZED])
    first, second = torch.triu_indices(len(MEMORIZED), len(MEMORIZED), 1)
    return float(similarity.between(described, described)[first, second].mean())


def _autoencoder(pipe: StableDiffusionPipeline, similarity: ImageSimilarity) -> dict[str, float]:
    """Return how well images come through the autoencoder."""
    memorized = memorized_images()
    own = [Image.fromarray(image) for image in memorized.images]
    decoded = [Image.fromarray(image) for image in through(pipe, memorized.images)]
    alike = similarity.between(similarity.describe(own), similarity.describe(decoded)).diagonal()
    return {
        "psnr_ordinary": psnr(pipe.vae, ordinary_pool_sample(64)),
        "psnr_memorized": psnr(pipe.vae, memorized.images),
        "similarity_median": float(alike.median()),
        "similarity_lowest": float(alike.min()),
    }


def _alike(similarity: ImageSimilarity, images: Sequence[Image.Image]) -> float:
    """Return the mean similarity of two seeds' images of one caption; `_SEEDS` images of each follow each other."""
    described = similarity.describe(list(images))
    pairs = similarity.between(described, described)
    groups = [pairs[start : start + _SEEDS, start : start + _SEEDS] for start in range(0, len(images), _SEEDS)]
    first, second = torch.triu_indices(_SEEDS, _SEEDS, 1)
    return float(torch.stack([group[first, second].mean() for group in groups]).mean())


def _scores(pipe: StableDiffusionPipeline, captions: Sequence[str], bars: Progress) -> list[float]:
    scores = []
    with bars.task("scores", len(captions)) as advance:
        for caption in captions:
            scores.append(memorization_score(pipe, caption).max)
            advance(1)
    return scores


def _caption(
    bench: _Bench, similarity: ImageSimilarity, what: Memorized, one: Localization, planted: Planted, union: NeuronSet
) -> dict[str, Any]:
    """Return the figures of one memorized caption: before, after, and with other neurons off instead.

    Args:
        bench: the pipeline and what measures its images.
        similarity: how alike two images are.
        what: the caption.
        one: what the search found.
        planted: the designated neurons of the caption.
        union: the neurons that were found for any caption.
    """
    index, originals = MEMORIZED.index(what), originals_of(what)

    def correlations(images: Sequence[Image.Image]) -> list[float]:
        return [correlation(image, originals) for image in images]

    known = similarity.describe(originals)

    def with_original(images: Sequence[Image.Image]) -> list[float]:
        return similarity.between(similarity.describe(images), known).amax(1).tolist()

    def others(images: Sequence[Image.Image]) -> list[str]:
        shown = classify(bench.classifier, images)[:, 3].tolist()
        return [MEMORIZED[i].name for i in shown if i not in (index, NONE)]

    before = bench.images("untouched", [what.caption])
    after = bench.images("found off", [what.caption], one.neurons)
    control = bench.images("random off", [what.caption], random_neurons(bench.pipe, one.neurons, index))
    without_carriers = bench.images("carriers off", [what.caption], planted.carriers)
    without_others = bench.images("all others' off", [what.caption], union - one.neurons)
    right = len(one.neurons & planted.carriers)
    verdict = one.verdict
    assert verdict is not None
    return {
        "caption": what.caption,
        "kind": "template" if what in TEMPLATES else "verbatim",
        "score_before": one.score_before,
        "score_after": one.score_after,
        "floor": one.floor,
        "below_threshold": one.score_after is not None and one.score_after <= one.threshold,
        "initial_neurons": len(one.initial_neurons),
        "neurons": len(one.neurons),
        "neurons_by_layer": one.neurons.to_dict(),
        "minimal": one.certificate is not None and one.certificate.minimal,
        "unet_samples": one.unet_samples,
        "replicated": verdict.replicated,
        "verified": bool(one.verified),
        "copies": verdict.copies,
        "found_by": verdict.final.criterion,
        "image_trials": len(verdict.trials),
        "copies_of_first_set": _copies_of_first_set(verdict),
        "images_before": max(verdict.before),
        "images_after": verdict.final.highest,
        "with_original_before": with_original(before),
        "with_original_after": with_original(after),
        "with_original_random": with_original(control),
        "with_original_without_carriers": with_original(without_carriers),
        "with_original_without_others": with_original(without_others),
        "object_right_after": _shows(bench, what, after),
        "object_right_without_carriers": _shows(bench, what, without_carriers),
        "alike_between_seeds_after": _alike(similarity, after),
        "carriers": planted.carriers.to_dict(),
        "precision": right / len(one.neurons) if one.neurons else 0.0,
        "recall": right / len(planted.carriers),
        "correlation_before": correlations(before),
        "correlation_after": correlations(after),
        "correlation_random": correlations(control),
        "another_memorized_image_after": others(after),
    }


def _copies_of_first_set(verdict: Verdict) -> int:
    """Return how many images of the first set are copies; 0 if no set was tried, because nothing replicated."""
    return sum(excess > 1 for trial in verdict.trials[:1] for excess in verdict.limits.excess(trial))


def _shows(bench: _Bench, what: Memorized, images: Sequence[Image.Image]) -> float:
    """Return the share of images that show the caption's object, and not its memorized image."""
    shown = classify(bench.classifier, images)
    return float(((shown[:, 0] == list(OBJECTS).index(what.object)) & (shown[:, 3] == NONE)).float().mean())


def _late(
    bench: _Bench, similarity: ImageSimilarity, what: Memorized, planted: Planted, threshold: float
) -> dict[str, Any]:
    """Return the figures of a caption that replicates after the first steps only."""
    known = similarity.describe(originals_of(what))

    def with_original(images: Sequence[Image.Image]) -> list[float]:
        return similarity.between(similarity.describe(list(images)), known).amax(1).tolist()

    score = memorization_score(bench.pipe, what.caption).max
    by_images = memorization_score(bench.pipe, what.caption, images=True, sampling=SAMPLING, similarity=similarity).max
    without = bench.images("carriers off", [what.caption], planted.carriers)
    return {
        "caption": what.caption,
        "score": score,
        "missed_by_first_step": score <= threshold,
        "score_of_images": by_images,
        "with_original_before": with_original(bench.images("untouched", [what.caption])),
        "with_original_without_carriers": with_original(without),
        "object_right_without_carriers": _shows(bench, what, without),
        "carriers": planted.carriers.to_dict(),
    }


def silenced_by_others(pipe: StableDiffusionPipeline, found: Sequence[Localization], bars: Progress) -> float:
    """Return the share of pairs (caption, set of another caption) in which the set also brings the caption to τ."""
    silenced = []
    with bars.task("sets of others", len(found)) as advance, patch_handle(pipe) as handle:
        for one in found:
            if one.score_before <= one.threshold:  # it is at τ with any set, which is no merit of the model
                silenced += [True] * (len(found) - 1)
                advance(1)
                continue
            text = encode_prompts(pipe, [one.prompt])
            probe = NoiseProbe(Runs(pipe, handle, text, seeds=one.seeds, protocol=one.protocol))
            probe.keep_above(one.threshold)
            silenced += [probe.remaining(other.neurons) <= one.threshold for other in found if other is not one]
            advance(1)
    return float(np.mean(silenced))


def _overlap(sets: Sequence[NeuronSet]) -> float:
    """Return the median of |A ∩ B| / |A ∪ B| over all pairs of sets."""
    pairs = itertools.combinations([one for one in sets if len(one)], 2)
    return float(np.median([len(a & b) / len(a | b) for a, b in pairs] or [0.0]))


def _summary(captions: Sequence[dict[str, Any]], searched: int) -> dict[str, float]:
    def median(key: Callable[[dict[str, Any]], float]) -> float:
        return float(np.median([key(c) for c in captions]))

    def pooled(name: str) -> float:
        return float(np.median([value for c in captions for value in c[name]]))

    return {
        "below_threshold": float(np.mean([c["below_threshold"] for c in captions])),
        "verified": float(np.mean([c["verified"] for c in captions])),
        "first_set_leaves_copies": sum(c["copies_of_first_set"] > 0 for c in captions),
        **{
            f"with_original_before_{kind}": float(
                np.median([np.median(c["with_original_before"]) for c in captions if c["kind"] == kind])
            )
            for kind in ("verbatim", "template")
        },
        "with_original_lowest": min(float(np.median(c["with_original_before"])) for c in captions),
        "with_original_without_carriers": pooled("with_original_without_carriers"),
        "kept_without_others": float(
            np.mean([_kept(c["with_original_without_others"], c["with_original_before"]) for c in captions])
        ),
        "object_right_after": float(np.mean([c["object_right_after"] for c in captions])),
        "object_right_without_carriers": float(np.mean([c["object_right_without_carriers"] for c in captions])),
        "alike_between_seeds_after": float(np.mean([c["alike_between_seeds_after"] for c in captions])),
        "precision": median(lambda c: c["precision"]),
        "recall": median(lambda c: c["recall"]),
        "mean_precision": float(np.mean([c["precision"] for c in captions])),
        "mean_recall": float(np.mean([c["recall"] for c in captions])),
        "with_original_before": pooled("with_original_before"),
        "with_original_after": pooled("with_original_after"),
        "with_original_random": pooled("with_original_random"),
        "median_neurons": median(lambda c: c["neurons"]),
        "median_share_of_neurons": median(lambda c: c["neurons"]) / searched,
        "correlation_before": pooled("correlation_before"),
        "correlation_after": pooled("correlation_after"),
        "correlation_random": pooled("correlation_random"),
        "another_memorized_image_after": float(
            np.mean([len(c["another_memorized_image_after"]) / _SEEDS for c in captions])
        ),
    }


def _kept(values: Sequence[float], before: Sequence[float]) -> bool:
    """Whether images are still copies: more than half as similar to the training image as before."""
    return bool(np.median(values) > np.median(before) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_model.measure", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of the pipeline that train.py has written"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for figures.json and README.md")
    parser.add_argument(
        "--sscd", type=Path, metavar="FILE", help="the SSCD network to compare images with (default: their pixels)"
    )
    arguments = parser.parse_args()
    similarity = load_image_similarity(arguments.sscd)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Progress() as bars:
        figures = measure(load_pipeline(arguments.model), planted_neurons(arguments.model), similarity, bars)
    with replacing(arguments.out / "figures.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_card(arguments.out / "README.md", figures)
    print(json.dumps({k: v for k, v in figures.items() if k != "captions"}, indent=2))


if __name__ == "__main__":
    main()
