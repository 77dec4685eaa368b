"""Which images an evaluation needs: of which prompts and seeds, with which neurons off, and where they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_ext.evaluate.control import random_neurons
from nemo_ext.models.layers import value_layers
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import Localization


class Stage(NamedTuple):
    """Images that are generated with the same neurons off.

    Attributes:
        name: "before", "after" or "control-DRAW".
        neurons: the neurons that are off.
        wanted: for each image its prompt, its seed, and the folder where it is stored; None: it is not stored.
    """

    name: str
    neurons: NeuronSet
    wanted: list[tuple[str, int, Path | None]]


class Plan:
    """The images of an evaluation.

    Args:
        pipe: a pipeline; the random neurons are drawn from its layers.
        seeds: the seeds of each memorized prompt. An ordinary prompt has one seed.
        draws: the number of random sets for each memorized prompt.
        folder: the folder of the results; None: nothing is stored.
    """

    def __init__(self, pipe: Any, seeds: Sequence[int], draws: int, folder: ResultsFolder | None) -> None:
        self._widths = {name: layer.out_features for name, layer in value_layers(pipe, "all").items()}
        self._seeds, self._draws, self._folder = seeds, draws, folder

    def of_prompt(self, index: int, found: Localization) -> list[Stage]:
        """The stages of one memorized prompt; `index` is its position in results.jsonl."""
        folder = None if self._folder is None else self._folder.evaluated_folder(index, found.prompt)
        wanted = [(found.prompt, seed, folder) for seed in self._seeds]
        controls = {
            f"control-{draw}": random_neurons(found.neurons, self._widths, seed=f"{draw} {found.prompt}")
            for draw in range(1, self._draws + 1)
        }
        stages = {"before": NeuronSet(), "after": found.neurons, **controls}
        return [Stage(name, neurons, wanted) for name, neurons in stages.items()]

    def of_ordinary(self, prompts: Sequence[str], union: NeuronSet, batch_size: int) -> Iterator[list[Stage]]:
        """The stages of ordinary prompts, `batch_size` prompts at a time; `union` has all neurons that were found."""
        control = random_neurons(union, self._widths, seed="ordinary prompts")
        # Different seeds, so that no two prompts' images depend on the same noise.
        wanted = [
            (
                prompt,
                self._seeds[0] + index,
                None if self._folder is None else self._folder.ordinary_folder(index, prompt),
            )
            for index, prompt in enumerate(prompts)
        ]
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            yield [
                Stage("before", NeuronSet(), batch),
                Stage("after", union, batch),
                Stage("control-1", control, batch),
            ]
