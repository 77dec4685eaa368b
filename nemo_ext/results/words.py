"""What a result means, in words that tables, the command line, the demo and the report share."""

from __future__ import annotations

from enum import Enum

from nemo_ext.results.record import Localization, Verdict


class Meaning(Enum):
    """What is known about a prompt's images. Every result has exactly one meaning, so counts of them add up.

    Attributes:
        NOT_MEMORIZED: nothing was searched.
        GONE: the images of the untouched model replicate, and no image does with the neurons off.
        STILL_THERE: at least one image still replicates with the neurons off.
        NEVER_ALIKE: no image replicates with the neurons off, but the images of the untouched model do not either.
        NOT_CHECKED: a set of neurons was searched, but no images were compared.
    """

    NOT_MEMORIZED = "not memorized"
    GONE = "gone"
    STILL_THERE = "still there"
    NEVER_ALIKE = "never alike"
    NOT_CHECKED = "not checked"


def meaning(found: Localization) -> Meaning:
    """What is known about the images of one prompt."""
    if not found.memorized:
        return Meaning.NOT_MEMORIZED
    if found.verdict is None:
        return Meaning.NOT_CHECKED
    if not found.verdict.silenced:
        return Meaning.STILL_THERE
    return Meaning.GONE if found.verdict.replicated else Meaning.NEVER_ALIKE


def short_verdict(found: Localization) -> str:
    """The verdict for a cell of a table."""
    if not found.memorized:
        return "not memorized"
    verdict = found.verdict
    if verdict is None:
        return "images not checked" if found.below_threshold else "images not checked, first step above τ"
    seeds = len(verdict.seeds)
    if not verdict.silenced:
        return f"STILL THERE in {verdict.copies} of {seeds} images"
    short = f"gone in {seeds} of {seeds} images" if verdict.replicated else "images were never alike"
    return f"{short}, another image in {others}" if (others := other_images(verdict)) else short


def verdict_headline(found: Localization) -> str:
    """The verdict in a few words without figures, which are enough for a reader who reads nothing else."""
    verdict = found.verdict
    if not found.memorized:
        return "Not memorized" if verdict else "Not memorized, judged by the first step alone"
    if verdict is None:
        side = "below" if found.below_threshold else "still above"
        return f"Images not checked: the first step is {side} τ"
    seeds = len(verdict.seeds)
    if not verdict.silenced:
        still = f"{verdict.copies} of {seeds} images still replicate"
        return (
            f"First step below τ, but {still}" if found.below_threshold else f"{still}, and the first step is above τ"
        )
    if not verdict.replicated:
        return f"The images of {seeds} seeds were not alike before, and are not alike now"
    return f"The image no longer comes back: {seeds} of {seeds} seeds"


def verdict_sentence(found: Localization) -> str:
    """The verdict as a sentence that says what was measured: the first step alone, or the images too."""
    return f"{verdict_headline(found)}; {verdict_figures(found)}."


def verdict_figures(found: Localization) -> str:
    """The figures behind the verdict, as the second half of a sentence and, if images were compared, a further one."""
    verdict = found.verdict
    if not found.memorized:
        first = f"the score {found.score_before:.3f} is not above τ = {found.threshold:.3f}"
        if verdict is None:
            return first
        highest = (
            f"the highest similarity of two images is {max(verdict.before):.3f} (τ_image = {verdict.threshold:.3f}"
        )
        # A prompt counts as memorized by its images only if they are more alike than those of every ordinary prompt.
        return f"{first}, and {highest}{', which some ordinary prompts exceed, too' if verdict.replicated else ''})"
    assert found.score_after is not None
    first = f"the first step went from {found.score_before:.3f} to {found.score_after:.3f} (τ = {found.threshold:.3f})"
    if verdict is None:
        return first
    limits, final = verdict.limits, verdict.final
    return (
        f"{first}. The images' highest similarity with the untouched model's went from {max(verdict.before):.3f} to "
        f"{max(final.remaining):.3f} (a copy is above {limits.remaining:.3f}), and with each other to "
        f"{max(final.diversity):.3f} (a copy is above {limits.diversity:.3f})"
    )


def other_images(verdict: Verdict) -> int:
    """The number of seeds whose image is another prompt's training image, with the neurons of the result off."""
    return sum(prompt is not None for prompt in verdict.instead or ())
