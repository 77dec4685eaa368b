"""The order in which seeds are tried: a set of neurons fails as soon as one seed is above the limit."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class SeedOrder:
    """Seeds, the one that is most likely to be above the limit first.

    It learns from evaluations alone: the searches tell it every new result, and asking for the order changes nothing.

    Args:
        seeds: the seeds, the likeliest first.
    """

    def __init__(self, seeds: Collection[int]) -> None:
        self._seeds = list(seeds)

    def among(self, seeds: Collection[int] | None = None) -> tuple[int, ...]:
        """The seeds in order; of all, or of some."""
        return tuple(seed for seed in self._seeds if seeds is None or seed in seeds)

    def failed(self, seed: int) -> None:
        """A seed was above the limit: it is tried first from now on."""
        self._seeds.remove(seed)
        self._seeds.insert(0, seed)

    def passed(self, similarity: Mapping[int, float]) -> None:
        """All seeds were below the limit: from now on the one that came closest is tried first."""
        self._seeds.sort(key=lambda seed: -similarity[seed])
