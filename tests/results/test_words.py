"""What a result means, in words that a reader cannot misunderstand."""

from dataclasses import fields, replace
from typing import Any

import pytest

from nemo_ext.results.record import ImageTrial, Localization, Verdict
from nemo_ext.results.words import (
    Meaning,
    meaning,
    short_verdict,
    verdict_figures,
    verdict_headline,
    verdict_sentence,
)

SILENCED, ONE_COPY = (0.3, 0.2, 0.1, 0.3), (0.3, 0.2, 0.8, 0.3)
ALIKE, DIFFERENT = (0.9, 0.8, 0.9, 0.8), (0.3, 0.2, 0.3, 0.2)


def verdict(before: tuple[float, ...], after: tuple[float, ...], **changes: Any) -> Verdict:
    """A verdict of four seeds, with τ_image = 0.5."""
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Verdict))
    final = ImageTrial(2, "first step", 0.25, remaining=after, diversity=(0.1,) * 4)
    values |= {"threshold": 0.5, "seeds": (1, 2, 3, 4), "before": before, "final": final}
    return Verdict(**{**values, **changes})


def localization(**changes: Any) -> Localization:
    """A result with τ = 0.43; fields that words do not depend on are None."""
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Localization))
    values |= {"memorized": True, "score_before": 0.875, "score_after": 0.25, "threshold": 0.43}
    return Localization(**{**values, **changes})


UNCHECKED = localization()
GONE = localization(verdict=verdict(ALIKE, SILENCED))
STILL_THERE = localization(verdict=verdict(ALIKE, ONE_COPY))
NEVER_ALIKE = localization(verdict=verdict(DIFFERENT, SILENCED))
NOT_MEMORIZED = localization(memorized=False, score_before=0.3125, score_after=None)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (UNCHECKED, Meaning.NOT_CHECKED),
        (GONE, Meaning.GONE),
        (STILL_THERE, Meaning.STILL_THERE),
        (NEVER_ALIKE, Meaning.NEVER_ALIKE),
        (NOT_MEMORIZED, Meaning.NOT_MEMORIZED),
        (replace(NOT_MEMORIZED, verdict=verdict(DIFFERENT, DIFFERENT)), Meaning.NOT_MEMORIZED),
    ],
)
def test_a_result_has_one_meaning(found: Localization, expected: Meaning) -> None:
    assert meaning(found) is expected


def test_a_first_step_below_the_threshold_is_no_success_while_images_replicate() -> None:
    assert verdict_headline(STILL_THERE) == "First step below τ, but 1 of 4 images still replicate"
    assert short_verdict(STILL_THERE) == "STILL THERE in 1 of 4 images"


def test_a_first_step_above_the_threshold_is_named_beside_the_images() -> None:
    headline = verdict_headline(replace(STILL_THERE, score_after=0.5))
    assert headline == "1 of 4 images still replicate, and the first step is above τ"


def test_an_image_that_is_gone_is_gone_for_a_number_of_seeds() -> None:
    assert verdict_headline(GONE) == "The image no longer comes back: 4 of 4 seeds"
    assert short_verdict(GONE) == "gone in 4 of 4 images"


@pytest.mark.parametrize(("after", "side"), [(0.25, "below τ"), (0.5, "still above τ")])
def test_images_that_nobody_checked_are_said_to_be_unchecked(after: float, side: str) -> None:
    found = replace(UNCHECKED, score_after=after)
    assert verdict_headline(found) == f"Images not checked: the first step is {side}"
    assert short_verdict(found).startswith("images not checked")


def test_images_that_never_replicated_are_not_said_to_be_gone() -> None:
    for words in (verdict_headline(NEVER_ALIKE), short_verdict(NEVER_ALIKE)):
        assert "alike" in words
        assert "gone" not in words
        assert "no longer" not in words


def test_another_image_in_place_of_the_first_is_part_of_the_verdict() -> None:
    found = localization(verdict=verdict(ALIKE, SILENCED, instead=("another", None, "another", None)))
    assert short_verdict(found) == "gone in 4 of 4 images, another image in 2"


def test_the_sentence_has_the_figures_of_the_first_step_and_of_the_images() -> None:
    assert verdict_sentence(GONE) == (
        "The image no longer comes back: 4 of 4 seeds; the first step went from 0.875 to 0.250 (τ = 0.430). "
        "The images' highest similarity with the untouched model's went from 0.900 to 0.300 (a copy is above 0.450), "
        "and with each other to 0.100 (a copy is above 0.700)."
    )


def test_a_prompt_that_is_not_memorized_has_the_figures_that_say_so() -> None:
    assert verdict_figures(NOT_MEMORIZED) == "the score 0.312 is not above τ = 0.430"
    assert "first step alone" in verdict_headline(NOT_MEMORIZED)


def test_images_above_the_threshold_that_are_not_memorized_are_explained() -> None:
    """A prompt is memorized by its images only if they are more alike than those of all ordinary prompts."""
    found = replace(NOT_MEMORIZED, verdict=verdict((0.6, 0.6, 0.2, 0.2), (0.6, 0.6, 0.2, 0.2)))
    assert verdict_headline(found) == "Not memorized"
    assert "0.600 (τ_image = 0.500, which some ordinary prompts exceed, too)" in verdict_figures(found)
