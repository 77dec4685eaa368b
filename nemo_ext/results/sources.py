"""Where neurons come from: sets, their files, and results of searches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nemo_ext.errors import NemoError
from nemo_ext.files import check_input_file
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import read_results
from nemo_ext.results.record import Localization

#: Names neurons: a `NeuronSet` or another mapping of layer name to indices; a file of a `NeuronSet`, .json or
#: .safetensors; a result; a results folder, or its file results.jsonl.
Source: TypeAlias = Mapping[str, Sequence[int]] | Localization | str | os.PathLike[str]


@dataclass(frozen=True)
class Chosen:
    """Sets of neurons, and what is known about them.

    Attributes:
        sets: name -> set. The name is the prompt of a result, the path of a file, or "set N".
        results: the results that some of the sets come from.
        notes: a sentence for each result whose set is left out although its prompt is memorized.
    """

    sets: Mapping[str, NeuronSet]
    results: tuple[Localization, ...]
    notes: tuple[str, ...]

    @property
    def neurons(self) -> NeuronSet:
        """The union of all sets."""
        return NeuronSet.union(self.sets.values())


def choose(sources: Source | Iterable[Source]) -> Chosen:
    """Read the neurons of all sources.

    The neurons of a result are taken if its prompt is memorized, unless its images were checked and still replicate. A
    result whose images were not checked counts: its neurons are the search's answer for the first denoising step. If
    a prompt has several results, their neurons together are one set.

    Args:
        sources: one source, or several.

    Raises:
        NemoError: a source cannot be read, or there are no neurons in all of them.
    """
    one = isinstance(sources, str | os.PathLike | Mapping | Localization)
    sets: dict[str, NeuronSet] = {}
    results: list[Localization] = []
    notes: list[str] = []

    def add(name: str, neurons: NeuronSet) -> None:
        sets[name] = sets.get(name, NeuronSet()) | neurons

    for source in [sources] if one else sources:  # type: ignore[union-attr]
        if isinstance(source, Localization):
            found, name = [source], "the given results"
        elif isinstance(source, Mapping):
            add(f"set {len(sets) + 1}", source if isinstance(source, NeuronSet) else NeuronSet(source))
            continue
        elif _holds_results(path := _path(source)):
            found, name = read_results(path), str(path)
        else:
            add(str(path), NeuronSet.load(check_input_file(path, "neurons", "`nemo-ext localize`")))
            continue
        for position, result in enumerate(found):
            if result.verified is False:
                notes.append(
                    f"result {position} of {name} is left out, because its image still comes back with its "
                    f"{len(result.neurons)} neurons off"
                )
            elif result.memorized and result.neurons:
                results.append(result)
                add(result.prompt, result.neurons)
    if not any(sets.values()):
        reason = f" ({'; '.join(notes)})" if notes else ""
        raise NemoError(f"there are no neurons to switch off in what was given{reason}: give neurons or results")
    return Chosen(sets, tuple(results), tuple(notes))


def _path(source: Any) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise NemoError(f"neurons must be a mapping, a result or a path, got {type(source).__name__}")
    return Path(source)


def _holds_results(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".jsonl"
