"""Results in the file format of the published code, which its scripts for images and measures read."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable

from nemo_ext.files import replacing
from nemo_ext.neurons import NeuronSet
from nemo_ext.prompts import Prompt
from nemo_ext.results.record import Localization

#: The columns, in the order and with the names of `3_detect_memorized_neurons.py`.
HEADER = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")


def write_published_results(path: str | os.PathLike[str], results: Iterable[tuple[Prompt, Localization]]) -> None:
    """Write results as the published code does: a CSV file with semicolons, one row for each prompt, atomically.

    A column of neurons has one list of indices for each searched layer, in network order, which are seven lists for
    Stable Diffusion 1 with its default layers. As in the published code, a prompt that is not memorized has empty lists
    and the similarity 0. If a set was found by images among all neurons, there was no initial selection, and the
    initial similarity is left empty.

    Args:
        path: the file.
        results: each prompt of the list with its result, in the order of the list.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(HEADER)
        for prompt, found in results:
            writer.writerow(
                (
                    prompt.text,
                    prompt.url or "",
                    _by_layer(found.initial_neurons, found),
                    _shown(initial_score(found)) if found.memorized else 0,
                    _by_layer(found.neurons, found),
                    _shown(found.score_after) if found.memorized else 0,
                )
            )


def initial_score(found: Localization) -> float | None:
    """The remaining memorization with the initial selection off; None if the set was not found by a selection.

    The grouped search measures it on the seeds that it watches, and the exhaustive search on all kept seeds.

    It is the first trial with so many neurons off that is not above the τ of the search: every earlier selection is a
    smaller set, and every trial of the refinement, too.
    """
    if found.theta is None or found.threshold_used is None:
        return None
    wanted = len(found.initial_neurons)
    return next((score for off, score in found.history if off == wanted and score <= found.threshold_used), None)


def _by_layer(neurons: NeuronSet, found: Localization) -> list[list[int]]:
    return [list(neurons.get(layer, ())) for layer in found.layers]


def _shown(score: float | None) -> float | str:
    return "" if score is None else score
