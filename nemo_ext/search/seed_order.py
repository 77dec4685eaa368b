"""The order in which seeds are tried: a set of neurons fails as soon as one seed is above the limit."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class SeedOrder:
    """An order of seeds that begins with the seed that is most likely to be above the limit.

    Only new results change the order; reading it does not.

    Args:
        seeds: the seeds in their initial order.
    """

    def __init__(self, seeds: Collection[int]) -> None:
        self._seeds = list(seeds)

    def among(self, seeds: Collection[int] | None = None) -> tuple[int, ...]:
        """All seeds in this order, or those that are in `seeds`."""
        return tuple(seed for seed in self._seeds if seeds is None or seed in seeds)

    def failed(self, seed: int) -> None:
        """Move a seed that was above the limit to the front."""
        self._seeds.remove(seed)
        self._seeds.insert(0, seed)

    def passed(self, similarity: Mapping[int, float]) -> None:
        """Sort the seeds by their similarities, the highest first, after all of them were at or below the limit."""
        self._seeds.sort(key=lambda seed: -similarity[seed])
