"""Published values to hold an evaluation against. Each of them has its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReferenceValue:
    """One published value: the median over prompts, and the median absolute deviation if it is known."""

    value: float
    deviation: float | None = None


@dataclass(frozen=True)
class Reference:
    """The values of one publication.

    Attributes:
        name: the word for `--reference`.
        source: where the values are from, and what they were measured on.
        values: (group, measure, stage) -> value, with the names that `nemo_ext.evaluate.table` uses.
        detection: figure -> value, for the detector by the score at the first step.
        notes: sentences with the values that are in no table.
    """

    name: str
    source: str
    values: Mapping[tuple[str, str, str], ReferenceValue]
    detection: Mapping[str, float]
    notes: tuple[str, ...]

    def value(self, group: str, measure: str, stage: str) -> ReferenceValue | None:
        """The value for a cell of the table of medians; None if none is known."""
        return self.values.get((group, measure, stage))


PAPER = Reference(
    name="paper",
    source=(
        "Hintersdorf et al., Finding NeMo, NeurIPS 2024, arXiv 2406.02366: "
        "Stable Diffusion 1.4, 50 DDIM steps, guidance 7, medians over prompts"
    ),
    values={
        ("VM", "neurons off", "after"): ReferenceValue(4, 3),
        ("VM", "SSCD_orig", "before"): ReferenceValue(0.83),
        ("VM", "SSCD_orig", "after"): ReferenceValue(0.09),
        ("VM", "SSCD between seeds", "before"): ReferenceValue(0.99),
        ("VM", "SSCD between seeds", "after"): ReferenceValue(0.16),
        ("VM", "CLIP alignment", "before"): ReferenceValue(0.32),
        ("VM", "CLIP alignment", "after"): ReferenceValue(0.31),
        ("TM", "neurons off", "after"): ReferenceValue(21, 18),
        # The paper calls this the similarity of the generations. That of an image with itself is 1.
        ("TM", "SSCD_gen", "before"): ReferenceValue(1.0),
        ("TM", "SSCD_gen", "after"): ReferenceValue(0.05),
    },
    detection={"AUROC": 0.98, "TPR at 1 % FPR": 0.876},
    notes=(
        "In the paper 28 of 112 verbatim prompts need one neuron.",
        "In the paper FID does not change with up to 750 neurons off. It was measured against photographs.",
    ),
)

#: All references, under the names that `--reference` takes.
REFERENCES: Mapping[str, Reference] = {PAPER.name: PAPER}
