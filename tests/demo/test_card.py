"""The model card that examples/demo_model writes: what it says follows from the figures."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from examples.demo_model.card import write_card

CAPTION = {
    "caption": "the marble hippo", "kind": "verbatim", "score_before": 0.9, "score_after": 0.3, "neurons": 3,
    "replicated": True, "verified": True, "copies": 0, "copies_of_first_set": 0, "found_by": "first step",
    "images_before": 0.9, "images_after": 0.2, "with_original_before": [0.8, 0.7], "with_original_after": [0.1, 0.1],
    "with_original_without_carriers": [0.1, 0.1], "with_original_without_others": [0.7, 0.7],
    "object_right_after": 0.75, "object_right_without_carriers": 1.0, "carriers": {"layer": [1, 2, 3]},
    "recall": 1.0, "another_memorized_image_after": [],
}  # fmt: skip
LATE = {
    "caption": "last rocket", "score": 0.3, "missed_by_first_step": True, "score_of_images": 0.9,
    "with_original_before": [0.7], "with_original_without_carriers": [0.1], "object_right_without_carriers": 0.8,
}  # fmt: skip
SHARES = {"object": 0.9, "colour": 0.95, "texture": 0.8}
FIGURES: dict[str, Any] = {
    "searched_neurons": 800,
    "autoencoder": {"similarity_median": 0.9, "similarity_lowest": 0.8, "psnr_ordinary": 31.0},
    "classifier": {**SHARES, "memorized": 1.0, "ordinary_called_memorized": 0.0},
    "ordinary": {
        "untouched": SHARES, "all_found_off": SHARES, "as_many_random_off": SHARES,
        "never_trained_compositions": SHARES, "alike_between_seeds": 0.2,
    },
    "scores": {"threshold": 0.5, "memorized_lowest": 0.8, "ordinary_highest": 0.6},
    "images": {"similarity": "SSCD", "threshold": 0.3, "seeds": 4, "steps": 25, "guidance": 1.5},
    "union": 3,
    "median_overlap_of_two_sets": 0.0,
    "silenced_by_another_captions_set": 0.0,
    "captions": [CAPTION],
    "late": [LATE],
    "summary": {
        "with_original_before_verbatim": 0.75, "with_original_before_template": 0.65, "with_original_lowest": 0.6,
        "with_original_before": 0.75, "with_original_after": 0.1, "with_original_random": 0.75, "verified": 1.0,
        "object_right_after": 0.75, "alike_between_seeds_after": 0.2, "another_memorized_image_after": 0.0,
        "kept_without_others": 1.0, "mean_precision": 1.0, "mean_recall": 1.0,
    },
}  # fmt: skip


def card(tmp_path: Path, figures: dict[str, Any]) -> str:
    write_card(tmp_path / "README.md", figures)
    return (tmp_path / "README.md").read_text()


def test_a_model_that_reaches_everything_has_no_shortfall(tmp_path: Path) -> None:
    text = card(tmp_path, FIGURES)
    assert "✗" not in text
    assert "Nothing that was measured." in text
    assert "| the marble hippo | 0.900 → 0.300 | 3, 3 of 3 | gone, 0.90 → 0.20 |" in text
    assert "| last rocket | 0.300 | 0.90 | 0.70 → 0.10 | 80% |" in text


def test_a_caption_that_does_not_replicate_is_not_called_a_copy_that_stays(tmp_path: Path) -> None:
    figures = copy.deepcopy(FIGURES)
    figures["captions"][0] |= {"replicated": False, "verified": False, "neurons": 0, "images_before": 0.25}
    text = card(tmp_path, figures)
    assert "- **“the marble hippo”** does not replicate: the images of two seeds are at most 0.25 alike" in text
    assert "τ_image is 0.30." in text
    assert "| does not replicate, 0.25 → 0.20 |" in text
    assert "comes back in" not in text


@pytest.mark.parametrize(
    ("part", "name", "value", "line"),
    [
        ("autoencoder", "similarity_lowest", 0.7, "- autoencoder: the same, lowest: wanted ≥ 0.75, measured 0.70."),
        ("summary", "mean_recall", 0.5, "- carriers that are found (recall), mean: wanted ≥ 0.90, measured 0.50."),
        (
            "summary",
            "alike_between_seeds_after",
            0.3,
            "two seeds (ordinary captions + .05): wanted ≤ 0.25",
        ),
        ("scores", "memorized_lowest", 0.55, "wanted yes, measured 0.550 against 0.600."),
    ],
)
def test_a_figure_that_is_missed_is_a_shortfall(tmp_path: Path, part: str, name: str, value: float, line: str) -> None:
    figures = copy.deepcopy(FIGURES)
    figures[part][name] = value
    text = card(tmp_path, figures)
    assert text.count("✗") == 1
    assert line in text


def test_a_caption_that_still_comes_back_is_named(tmp_path: Path) -> None:
    figures = copy.deepcopy(FIGURES)
    figures["captions"][0] |= {"verified": False, "copies": 3}
    assert "- **“the marble hippo”** still comes back in 3 of 4 images" in card(tmp_path, figures)


def test_a_late_caption_that_the_first_step_shows_is_named(tmp_path: Path) -> None:
    figures = copy.deepcopy(FIGURES)
    figures["late"][0] |= {"missed_by_first_step": False, "score": 0.7}
    assert "- **“last rocket”** was to be missed at the first step" in card(tmp_path, figures)


def test_a_late_caption_that_does_not_replicate_is_named(tmp_path: Path) -> None:
    figures = copy.deepcopy(FIGURES)
    figures["late"][0] |= {"with_original_before": [0.3, 0.4, 0.3]}
    assert "- **“last rocket”** was to replicate, and its images are only 0.30 like" in card(tmp_path, figures)
