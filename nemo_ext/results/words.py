"""What a result means, in words that tables, the command line, the demo and the report share."""

from __future__ import annotations

from nemo_ext.results.record import Localization, Verdict


def short_verdict(found: Localization) -> str:
    """The verdict for a cell of a table."""
    if not found.memorized:
        return "not memorized"
    if found.verdict is None:
        return "images not checked" if found.below_threshold else "first step above τ"
    seeds = len(found.verdict.seeds)
    if found.verdict.silenced:
        return f"gone in {seeds} of {seeds} images"
    return f"STILL THERE in {found.verdict.copies} of {seeds} images"


def verdict_sentence(found: Localization) -> str:
    """The verdict as a sentence that says what was measured: the first step alone, or the images too."""
    if not found.memorized:
        checked = "" if found.verdict is None else ", and the images of different seeds are not alike"
        return f"Not memorized: the score {found.score_before:.3f} is not above τ = {found.threshold:.3f}{checked}."
    assert found.score_after is not None
    side = "below τ" if found.below_threshold else "still above τ"
    first = f"the first step is {side} ({found.score_before:.3f} → {found.score_after:.3f}, τ = {found.threshold:.3f})"
    if found.verdict is None:
        return f"The images were not checked; {first}."
    return f"{_images(found.verdict)}; {first}."


def _images(verdict: Verdict) -> str:
    seeds = len(verdict.seeds)
    if not verdict.silenced:
        return f"The image still comes back: {verdict.copies} of {seeds} seeds still replicate"
    if not verdict.replicated:
        return f"The images of {seeds} seeds were not alike before, and are not alike now"
    return f"The image no longer comes back: {seeds} of {seeds} seeds"
