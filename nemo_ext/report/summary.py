"""What the report says about all prompts together: counts of verdicts, and one row of figures for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.words import Meaning, meaning, other_images, short_verdict

if TYPE_CHECKING:
    from nemo_ext.results.record import Localization


@dataclass(frozen=True)
class Look:
    """How a verdict looks: the name of its colour in the template's styles, and a sign for those who see no colours."""

    colour: str
    sign: str


LOOKS = {
    Meaning.NOT_MEMORIZED: Look("plain", "–"),
    Meaning.GONE: Look("good", "✓"),
    Meaning.STILL_THERE: Look("bad", "✗"),
    Meaning.NEVER_ALIKE: Look("unknown", "?"),
    Meaning.NOT_CHECKED: Look("unknown", "?"),
}


@dataclass(frozen=True)
class Count:
    """A figure at the top of the report: a number, the words after it, and how it looks if it is a verdict's."""

    number: int
    words: str
    look: Look | None = None


@dataclass(frozen=True)
class SummaryRow:
    """The figures of one prompt.

    Attributes:
        found: the result.
        verdict: the verdict in a few words.
        look: how the verdict looks.
        score: the score before → after.
        copies: the number of images that replicate, before → after, of all seeds; None if no images were compared, or
            the prompt is not memorized.
        similarity: the highest similarity of images before → after; None if no images were compared.
    """

    found: Localization
    verdict: str
    look: Look
    score: str
    copies: str | None
    similarity: str | None


def counts(localizations: Sequence[Localization]) -> list[Count]:
    """The figures at the top of the report. Verdicts that no prompt has are left out if they are rare ones."""
    memorized = [found for found in localizations if found.memorized]
    of = {one: sum(meaning(found) is one for found in memorized) for one in Meaning}
    replaced = sum(found.verdict is not None and other_images(found.verdict) > 0 for found in memorized)
    neurons = len(NeuronSet.union(found.neurons for found in memorized))
    shown = [
        Count(len(localizations), f"prompt{'' if len(localizations) == 1 else 's'} searched"),
        Count(len(memorized), "memorized"),
        Count(of[Meaning.GONE], "image gone" if of[Meaning.GONE] == 1 else "images gone", LOOKS[Meaning.GONE]),
        Count(of[Meaning.STILL_THERE], "still replicating", LOOKS[Meaning.STILL_THERE]),
        Count(of[Meaning.NOT_CHECKED], "with images not checked", LOOKS[Meaning.NOT_CHECKED]),
    ]
    if of[Meaning.NEVER_ALIKE]:
        shown.append(Count(of[Meaning.NEVER_ALIKE], "with images that were never alike", LOOKS[Meaning.NEVER_ALIKE]))
    if replaced:
        shown.append(Count(replaced, "with another memorized image instead", LOOKS[Meaning.STILL_THERE]))
    return [*shown, Count(neurons, f"different neuron{'' if neurons == 1 else 's'} in all")]


def summary_row(found: Localization) -> SummaryRow:
    """The figures of one prompt, for the table over all prompts."""
    verdict = found.verdict
    copies = similarity = None
    if verdict is not None:
        # Without a search, no neurons are off, and there is nothing after it.
        if found.memorized:
            before = sum(value > verdict.limits.remaining for value in verdict.before)
            copies = f"{before} → {verdict.copies} of {len(verdict.seeds)}"
        highest = f"{verdict.final.highest:.3f}" if found.memorized else None
        similarity = _change(f"{max(verdict.before):.3f}", highest)
    return SummaryRow(
        found=found,
        # Capital letters are for terminals without colours.
        verdict=short_verdict(found).replace("STILL THERE", "still there"),
        look=LOOKS[meaning(found)],
        score=_change(f"{found.score_before:.3f}", None if found.score_after is None else f"{found.score_after:.3f}"),
        copies=copies,
        similarity=similarity,
    )


def _change(before: str, after: str | None) -> str:
    return before if after is None else f"{before} → {after}"
