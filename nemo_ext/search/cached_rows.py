"""Cached rows: what earlier runs of one prompt recorded, for entering the denoiser in the middle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.partial_unet import FULL_RUN, EntryPoints, Row


class CachedRows:
    """For each seed, the rows of the sets of neurons that were used last, as many as the memory allows.

    Args:
        entry_points: where the denoiser can be entered; None: nowhere, and nothing is cached.
        seeds: S.
        memory: the bytes that all rows may take together.
    """

    def __init__(self, entry_points: EntryPoints | None, seeds: int, memory: int) -> None:
        self._entry_points = entry_points
        self._rows: list[OrderedDict[NeuronSet, Row]] = [OrderedDict() for _ in range(seeds)]
        self._sets = 0 if entry_points is None else memory // max(entry_points.row_bytes * seeds, 1)

    def entry(self, seed: int, neurons: NeuronSet) -> tuple[int, Row]:
        """The latest entry point whose upstream neurons match a cached run, and that run's row.

        Where there is none: `FULL_RUN` and an empty row.
        """
        if self._entry_points is None or not self._covers(neurons):
            return FULL_RUN, {}
        latest, match = FULL_RUN, None
        for cached in self._rows[seed]:
            start = self._first_difference(neurons, cached)
            if start >= latest:
                latest, match = start, cached
        if match is None:
            return FULL_RUN, {}
        self._rows[seed].move_to_end(match)
        return latest, self._rows[seed][match]

    def entry_before(self, seed: int, layers: Sequence[str]) -> tuple[int, Row]:
        """The entry point before the first of some layers, and a row for it while no neuron is off."""
        start, row = self.entry(seed, NeuronSet())
        if self._entry_points is None or start == FULL_RUN:
            return FULL_RUN, {}
        return min(start, *(place for place, name in enumerate(self._entry_points.layers) if name in layers)), row

    def keep(self, seed: int, neurons: NeuronSet, row: Row) -> None:
        """Cache a row; the one that was used the longest time ago makes room for it."""
        if self._covers(neurons):
            self._rows[seed][neurons] = row
            while len(self._rows[seed]) > self._sets:
                self._rows[seed].popitem(last=False)

    def share(self, start: int) -> float:
        """The share of a full run's FLOPs that a run from an entry point on takes."""
        return 1.0 if self._entry_points is None or start == FULL_RUN else self._entry_points.shares[start]

    @contextmanager
    def entering(self, start: int, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """`EntryPoints.entering`; where the denoiser cannot be entered, a plain block with empty rows."""
        if self._entry_points is None:
            yield [{} for _ in rows]
        else:
            with self._entry_points.entering(start, rows) as recorded:
                yield recorded

    def _covers(self, neurons: NeuronSet) -> bool:
        """Whether all neurons are in layers that are entry points; others could differ before any entry point."""
        return self._entry_points is not None and set(neurons) <= set(self._entry_points.layers)

    def _first_difference(self, neurons: NeuronSet, cached: NeuronSet) -> int:
        """The first entry point whose own layer has other neurons off; the last one if none has."""
        assert self._entry_points is not None
        layers = self._entry_points.layers
        differs = (place for place, name in enumerate(layers) if neurons.get(name, ()) != cached.get(name, ()))
        return next(differs, len(layers) - 1)
