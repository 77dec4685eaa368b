"""Measures the figures of the model card: `python -m examples.demo_model.measure --out DIR`.

It writes the figures to DIR/figures.json and the model card to DIR/README.md. At first it trains a small classifier.
The font Noto Color Emoji must be installed, as for training. All of it took an hour on one busy core (AMD EPYC, Zen 3).
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
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from nemo_ext.demo.captions import (
    COLOURS,
    MEMORIZED,
    OBJECTS,
    TEXTURES,
    VERBATIM,
    Ordinary,
    compositions,
    holdout_captions,
    ordinary_captions,
)
from nemo_ext.demo.run import (
    MODEL,
    SAMPLING,
    STATISTICS_PROMPTS,
    STATISTICS_TITLES,
    correlation,
    generate,
    original_images,
)
from nemo_ext.files import replacing
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
from nemo_ext.results.record import Localization
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.probe import NoiseProbe
from nemo_ext.search.runs import Runs
from nemo_ext.search.verification import Verification

from .autoencoder import encode
from .card import write_card
from .data import memorized_images, split_compositions, to_tensor
from .drawing import draw_ordinary

_SEEDS = 4
_ORDINARY_IMAGES = 64
_THRESHOLD_PROMPTS = 150
_CLASSIFIER_IMAGES = 9_600
_CLASSIFIER_STEPS = 900
_NONE = len(MEMORIZED)  # the classifier's answer for "no memorized image"


class Classifier(nn.Module):
    """Tells which object, colour, texture and memorized image, if any, an image shows."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(),
                              nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            ),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(9 * widths[-1], count) for name, count in _ANSWERS.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}


_ANSWERS = {
    "object": len(OBJECTS), "colour": len(COLOURS), "texture": len(TEXTURES), "memorized": _NONE + 1
}  # fmt: skip


def _labels(what: Ordinary) -> list[int]:
    return [
        list(OBJECTS).index(what.object), list(COLOURS).index(what.colour),
        TEXTURES.index(what.texture), _NONE,
    ]  # fmt: skip


def _fresh(count: int, seed: int, choices: Sequence[Ordinary]) -> tuple[np.ndarray, torch.Tensor]:
    """Draw `count` images that no training used, and return them with their labels, [count, 4]."""
    rng = np.random.default_rng(seed)
    what = [choices[int(i)] for i in rng.integers(0, len(choices), count)]
    return np.stack([draw_ordinary(w, rng) for w in what]), torch.tensor([_labels(w) for w in what])


@torch.no_grad()
def _through(pipe: StableDiffusionPipeline, images: np.ndarray) -> np.ndarray:
    """Encode and decode images with the autoencoder of the pipeline."""
    latents = encode(pipe.vae, images)
    decoded = [pipe.vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)]
    return ((torch.cat(decoded) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train_classifier(pipe: StableDiffusionPipeline, bars: Progress) -> tuple[Classifier, dict[str, float]]:
    """Train the classifier, and measure its accuracy on new images of held-out compositions."""
    torch.manual_seed(0)
    _, held_out = split_compositions()
    drawn, labels = _fresh(_CLASSIFIER_IMAGES, 1, compositions())
    # A third of the images go through the autoencoder, because generated images have its blur.
    third = len(drawn) // 3
    ordinary = to_tensor(np.concatenate([_through(pipe, drawn[:third]), drawn[third:]]))
    memorized = memorized_images()
    own = to_tensor(np.concatenate([memorized.images, _through(pipe, memorized.images)]))
    owner = torch.tensor(memorized.owner * 2)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, _CLASSIFIER_STEPS)
    rng = np.random.default_rng(2)
    by_caption = [torch.nonzero(owner == i).flatten() for i in range(_NONE)]
    with bars.task("classifier", _CLASSIFIER_STEPS) as advance:
        for _ in range(_CLASSIFIER_STEPS):
            pick = torch.from_numpy(rng.integers(0, len(ordinary), 48))
            captions = rng.integers(0, _NONE, 16)
            mine = torch.stack([by_caption[c][rng.integers(len(by_caption[c]))] for c in captions])
            images = torch.cat([ordinary[pick], _varied(own[mine])])
            answers = classifier(images + 0.08 * torch.rand(()) * torch.randn_like(images))
            wanted = torch.cat([labels[pick], torch.full((16, 4), -100)])
            wanted[48:, 3] = torch.from_numpy(captions)
            loss = sum(
                (F.cross_entropy(answers[name], wanted[:, i]) for i, name in enumerate(_ANSWERS)),
                torch.zeros(()),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    classifier.eval()
    test, test_labels = _fresh(600, 3, held_out)
    got = classify(classifier, [Image.fromarray(image) for image in _through(pipe, test)])
    accuracy = {name: float((got[:, i] == test_labels[:, i]).float().mean()) for i, name in enumerate(_ANSWERS)}
    seen = classify(classifier, [Image.fromarray(image) for image in _through(pipe, memorized.images)])
    accuracy["memorized"] = float((seen[:, 3] == torch.tensor(memorized.owner)).float().mean())
    accuracy["ordinary_called_memorized"] = float((got[:, 3] != _NONE).float().mean())
    return classifier, accuracy


def _varied(images: torch.Tensor) -> torch.Tensor:
    """Shift images by a few pixels, and change their brightness and contrast."""
    x, y = (int(v) for v in torch.randint(-5, 6, (2,)))
    padded = F.pad(images, (5, 5, 5, 5), mode="replicate")
    shifted = padded[..., 5 + y : 5 + y + images.shape[-2], 5 + x : 5 + x + images.shape[-1]]
    contrast = 1 + 0.3 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    return shifted * contrast + 0.2 * (torch.rand(len(images), 1, 1, 1) - 0.5)


@torch.no_grad()
def classify(classifier: Classifier, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return object, colour, texture and memorized image (`len(MEMORIZED)`: none) of each image, [I, 4] int64."""
    tensor = to_tensor(np.stack([np.asarray(image) for image in images]))
    answers = [classifier(part) for part in tensor.split(64)]
    return torch.stack([torch.cat([a[name] for a in answers]).argmax(1) for name in _ANSWERS], 1)


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
            made = generate(self.pipe, prompts, seeds)
            advance(1)
        return made

    def obeyed(self, name: str, what: Sequence[tuple[Ordinary, str]], neurons: NeuronSet) -> dict[str, float]:
        """Return the share of ordinary images, one for each caption, that show what their caption says."""
        with self.bars.task(name, 1), patched(self.pipe, neurons):
            made = generate(self.pipe, [c for _, c in what], range(101, 101 + len(what)))
        got = classify(self.classifier, made)
        wanted = torch.tensor([_labels(w) for w, _ in what])
        return {
            **{
                k: float((got[:, i] == wanted[:, i]).float().mean()) for i, k in enumerate(_ANSWERS) if k != "memorized"
            },
            "shows_a_memorized_image": float((got[:, 3] != _NONE).float().mean()),
        }


def measure(pipe: StableDiffusionPipeline, similarity: ImageSimilarity, bars: Progress) -> dict[str, Any]:
    """Return every figure of the model card, as written to figures.json.

    Args:
        pipe: the pipeline.
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
    memorized_scores = _scores(pipe, [m.caption for m in MEMORIZED], bars)
    # The verification is not given the training images, because a user rarely has them.
    localizer = Localizer(pipe, statistics=statistics, threshold=threshold, verify=Verification(similarity=similarity))
    found = localizer.localize_many([m.caption for m in MEMORIZED], progress=bars)
    union = NeuronSet()
    for one in found:
        union |= one.neurons
    captions = [_caption(bench, similarity, index, one) for index, one in enumerate(found)]
    searched = sum(layer.out_features for layer in value_layers(pipe).values())
    nothing = NeuronSet()
    return {
        "model": model_fingerprint(pipe),
        "searched_neurons": searched,
        "classifier": accuracy,
        "ordinary": {
            "untouched": bench.obeyed("ordinary", shown, nothing),
            "never_trained_compositions": bench.obeyed("compositions", composed, nothing),
            "all_found_off": bench.obeyed("ordinary, found off", shown, union),
            "as_many_random_off": bench.obeyed("ordinary, random off", shown, random_neurons(pipe, union, 5)),
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
        "summary": _summary(captions, searched),
    }


def different_originals(similarity: ImageSimilarity) -> float:
    """Return the mean similarity of two training images of different captions, the first one of each caption."""
    described = similarity.describe([original_images(what)[0] for what in MEMORIZED])
    first, second = torch.triu_indices(len(MEMORIZED), len(MEMORIZED), 1)
    return float(similarity.between(described, described)[first, second].mean())


def _scores(pipe: StableDiffusionPipeline, captions: Sequence[str], bars: Progress) -> list[float]:
    scores = []
    with bars.task("scores", len(captions)) as advance:
        for caption in captions:
            scores.append(memorization_score(pipe, caption).max)
            advance(1)
    return scores


def _caption(bench: _Bench, similarity: ImageSimilarity, index: int, one: Localization) -> dict[str, Any]:
    """Return the figures of one memorized caption: before, after, and with random neurons off instead."""
    what, originals = MEMORIZED[index], original_images(MEMORIZED[index])

    def correlations(images: Sequence[Image.Image]) -> list[float]:
        return [correlation(image, originals) for image in images]

    known = similarity.describe(originals)

    def with_original(images: Sequence[Image.Image]) -> list[float]:
        return similarity.between(similarity.describe(images), known).amax(1).tolist()

    def others(images: Sequence[Image.Image]) -> list[str]:
        shown = classify(bench.classifier, images)[:, 3].tolist()
        return [MEMORIZED[i].name for i in shown if i not in (index, _NONE)]

    before = bench.images("untouched", [what.caption])
    after = bench.images("found off", [what.caption], one.neurons)
    control = bench.images("random off", [what.caption], random_neurons(bench.pipe, one.neurons, index))
    verdict = one.verdict
    assert verdict is not None
    return {
        "caption": what.caption,
        "kind": "verbatim" if what in VERBATIM else "template",
        "score_before": one.score_before,
        "score_after": one.score_after,
        "floor": one.floor,
        "below_threshold": one.score_after is not None and one.score_after <= one.threshold,
        "initial_neurons": len(one.initial_neurons),
        "neurons": len(one.neurons),
        "neurons_by_layer": one.neurons.to_dict(),
        "minimal": one.certificate is not None and one.certificate.minimal,
        "unet_samples": one.unet_samples,
        "verified": one.verified,
        "copies": verdict.copies,
        "found_by": verdict.final.criterion,
        "image_trials": len(verdict.trials),
        "copies_of_first_set": sum(excess > 1 for excess in verdict.limits.excess(verdict.trials[0])),
        "images_before": max(verdict.before),
        "images_after": verdict.final.highest,
        "with_original_before": with_original(before),
        "with_original_after": with_original(after),
        "with_original_random": with_original(control),
        "correlation_before": correlations(before),
        "correlation_after": correlations(after),
        "correlation_random": correlations(control),
        "another_memorized_image_after": others(after),
    }


def silenced_by_others(pipe: StableDiffusionPipeline, found: Sequence[Localization], bars: Progress) -> float:
    """Return the share of pairs (caption, set of another caption) in which the set also brings the caption to τ."""
    silenced = []
    with bars.task("sets of others", len(found)) as advance, patch_handle(pipe) as handle:
        for one in found:
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_model.measure", description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="DIR", help="folder of the pipeline (default: the bundled model)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for figures.json and README.md")
    parser.add_argument(
        "--sscd", type=Path, metavar="FILE", help="the SSCD network to compare images with (default: their pixels)"
    )
    arguments = parser.parse_args()
    similarity = load_image_similarity(arguments.sscd)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Progress() as bars:
        figures = measure(load_pipeline(arguments.model), similarity, bars)
    with replacing(arguments.out / "figures.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_card(arguments.out / "README.md", figures)
    print(json.dumps({k: v for k, v in figures.items() if k != "captions"}, indent=2))


if __name__ == "__main__":
    main()
