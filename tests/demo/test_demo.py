"""The bundled model and `nemo-ext demo`: it memorized, and the search finds where."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nemo_ext import memorization_score
from nemo_ext.demo import load_demo_pipeline, original_images, run
from nemo_ext.demo.captions import (
    EARLY,
    LATE,
    MEMORIZED,
    OBJECTS,
    TEMPLATES,
    VARIATIONS,
    VERBATIM,
    compositions,
    ordinary_captions,
)
from nemo_ext.demo.planted import planted_neurons
from nemo_ext.demo.run import MODEL, SHOWN, correlation
from nemo_ext.errors import NemoError
from nemo_ext.models.layers import value_layers
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patched
from nemo_ext.results.folder import read_results


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return load_demo_pipeline()


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((MODEL / "figures.json").read_text())


def test_bundled_model_is_small_and_without_pickle() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md"}


def test_bundled_model_has_the_seven_layers_that_the_paper_searches(pipe: StableDiffusionPipeline) -> None:
    widths = [layer.out_features for layer in value_layers(pipe).values()]
    assert widths == [64, 64, 96, 96, 160, 160, 160]


def test_bundled_model_loads_in_one_precision_without_being_told() -> None:
    plain = StableDiffusionPipeline.from_pretrained(MODEL)
    assert plain.text_encoder.dtype == plain.unet.dtype == plain.vae.dtype == torch.float32


def test_every_memorized_caption_has_its_training_images() -> None:
    assert len(VERBATIM) >= 12
    assert len(TEMPLATES) == 4
    counts = [len(original_images(what)) for what in MEMORIZED]
    assert counts == [1] * len(VERBATIM) + [len(VARIATIONS)] * len(TEMPLATES) + [1] * len(LATE)


def test_every_memorized_caption_names_an_object_that_ordinary_captions_know() -> None:
    for what in MEMORIZED:
        assert what.object in OBJECTS
        assert what.object in what.caption


def test_planted_neurons_are_known_and_no_two_captions_share_one() -> None:
    planted = planted_neurons(MODEL)
    assert list(planted) == [what.caption for what in MEMORIZED]
    assert {len(own.carriers) for own in planted.values()} >= {1, 5}
    designated = [pair for own in planted.values() for neurons in own for pair in neurons.pairs()]
    assert len(set(designated)) == len(designated)


@pytest.mark.slow
def test_memorized_captions_score_above_the_threshold_and_ordinary_ones_mostly_below(
    pipe: StableDiffusionPipeline, figures: dict
) -> None:
    threshold = figures["scores"]["threshold"]
    assert all(memorization_score(pipe, what.caption).max > threshold for what in EARLY[::5])
    unseen = [caption for _, caption in ordinary_captions(6, seed=77)]
    assert sum(memorization_score(pipe, caption).max > threshold for caption in unseen) <= 3


@pytest.mark.slow
def test_its_own_carriers_silence_a_caption_and_those_of_all_others_do_not(
    pipe: StableDiffusionPipeline, figures: dict
) -> None:
    threshold, planted = figures["scores"]["threshold"], planted_neurons(MODEL)
    for what in EARLY[::5]:
        others = NeuronSet()
        for caption in planted.keys() - {what.caption}:
            others |= planted[caption].carriers
        with patched(pipe, planted[what.caption].carriers):
            assert memorization_score(pipe, what.caption).max < threshold
        with patched(pipe, others):
            assert memorization_score(pipe, what.caption).max > threshold


@pytest.mark.slow
def test_captions_that_replicate_late_are_missed_at_the_first_step_and_most_of_their_images_are_copies(
    pipe: StableDiffusionPipeline, figures: dict
) -> None:
    for what in LATE:
        assert memorization_score(pipe, what.caption).max < figures["scores"]["threshold"]
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
        steps, guidance = figures["images"]["steps"], figures["images"]["guidance"]
        made = pipe([what.caption] * 4, num_inference_steps=steps, guidance_scale=guidance, generator=seeds)
        assert sum(correlation(image, original_images(what)) > 0.8 for image in made.images) >= 3


def test_figures_belong_to_the_bundled_weights(pipe: StableDiffusionPipeline, figures: dict) -> None:
    assert figures["model"] == model_fingerprint(pipe)


def test_ordinary_captions_do_not_repeat() -> None:
    captions = [caption for _, caption in ordinary_captions(2000, seed=1)]
    assert len(set(captions)) == 2000
    assert not set(captions) & {what.caption for what in MEMORIZED}
    with pytest.raises(ValueError, match="count"):
        ordinary_captions(len(compositions()) * 100, seed=1)


def test_correlation_is_with_the_nearest_original() -> None:
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(2))
    assert correlation(first, [second, first]) == pytest.approx(1.0)
    assert abs(correlation(first, [second])) < 0.5


@pytest.mark.parametrize("own", ["images/holiday.png", "results.jsonl"])
def test_demo_leaves_a_folder_with_other_files_alone(tmp_path: Path, own: str) -> None:
    mine = tmp_path / own
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine\n")
    with pytest.raises(NemoError):
        run(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine\n"


@pytest.mark.slow
def test_demo_shows_replication_stopping(tmp_path: Path) -> None:
    out = tmp_path / "nemo-demo"
    done = subprocess.run(
        [sys.executable, "-m", "nemo_ext", "demo", "--out", str(out)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Localization" in done.stdout
    assert done.stdout.count("gone in") == len(SHOWN)
    assert "nemo-ext localize" in done.stdout
    for name in (
        *("contact-sheet.png", "report.html", "statistics.safetensors", "threshold.json", "memorized.txt"),
        "originals.csv",
    ):
        assert (out / name).stat().st_size > 0
    results = read_results(out)
    assert [found.prompt for found in results] == [what.caption for what in SHOWN]
    folders = sorted((out / "images").iterdir())
    before, after = [], []
    for what, found, folder in zip(SHOWN, results, folders, strict=True):
        assert found.memorized
        assert found.verified
        assert found.verdict is not None
        assert found.verdict.replicated
        assert 0 < len(found.neurons) <= 40  # 5 % of the searched ones
        assert len(list(folder.glob("before-*.png"))) == len(list(folder.glob("after-*.png"))) == 4
        own_before, own_after = (
            [correlation(Image.open(path), original_images(what)) for path in folder.glob(pattern)]
            for pattern in ("before-*.png", "after-*.png")
        )
        assert np.median(own_after) < np.median(own_before) - 0.4
        before += own_before
        after += own_after
    # What the model card claims of all captions, of those shown here.
    assert np.median(before) >= 0.85
    assert np.median(after) < 0.3
