"""Cached rows: module outputs that earlier runs of one prompt recorded, for entering the denoiser in the middle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.partial_unet import FULL_RUN, EntryPoints, Row


class CachedRows:
    """A cache of the most recently used rows of each seed, as many as fit into the memory limit.

    Args:
        entry_points: where the denoiser can be entered; None: it cannot be entered, and nothing is cached.
        seeds: S.
        memory: the largest total size of the rows, in bytes.
    """

    def __init__(self, entry_points: EntryPoints | None, seeds: int, memory: int) -> None:
        self._entry_points = entry_points
        self._rows: list[OrderedDict[NeuronSet, Row]] = [OrderedDict() for _ in range(seeds)]
        self._rows_per_seed = 0 if entry_points is None else memory // max(entry_points.row_bytes * seeds, 1)

    def entry(self, seed: int, neurons: NeuronSet) -> tuple[int, Row]:
        """The latest entry point whose upstream neurons match a cached run, and that run's row.

        If there is none, the result is `FULL_RUN` and an empty row.
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

    def keep(self, seed: int, neurons: NeuronSet, row: Row) -> None:
        """Cache a row. If the cache is full, the least recently used row of this seed is removed."""
        if self._covers(neurons):
            self._rows[seed][neurons] = row
            while len(self._rows[seed]) > self._rows_per_seed:
                self._rows[seed].popitem(last=False)

    def share(self, start: int) -> float:
        """The FLOPs of a run from an entry point on, as a share of a full run's."""
        return 1.0 if self._entry_points is None or start == FULL_RUN else self._entry_points.shares[start]

    @contextmanager
    def entering(self, start: int, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Do what `EntryPoints.entering` does. If the denoiser cannot be entered, the recorded rows are empty."""
        if self._entry_points is None:
            yield [{} for _ in rows]
        else:
            with self._entry_points.entering(start, rows) as recorded:
                yield recorded

    def _covers(self, neurons: NeuronSet) -> bool:
        """Whether all neurons are in layers that are entry points. Other layers may be upstream of an entry point."""
        return self._entry_points is not None and set(neurons) <= set(self._entry_points.layers)

    def _first_difference(self, neurons: NeuronSet, cached: NeuronSet) -> int:
        """The first entry point whose own layer has different neurons off; the last entry point if none has."""
        assert self._entry_points is not None
        layers = self._entry_points.layers
        differs = (place for place, name in enumerate(layers) if neurons.get(name, ()) != cached.get(name, ()))
        return next(differs, len(layers) - 1)
