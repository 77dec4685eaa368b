"""Images without a model: verification needs a similarity for a set of neurons, so any function will do."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nemo_ext.neurons import NeuronSet

#: (neurons that are off, place of the seed) -> similarity with other seeds' images of the untouched model.
Remaining = Callable[[NeuronSet, int], float]


class FakeImages:
    """Takes the place of `ImageRuns`, and counts images as it does.

    Args:
        remaining: how much of the image each seed still shows.
        diversity: how alike the seeds' images are with neurons off; None: not at all.
        before: the same for the untouched model.
    """

    def __init__(
        self,
        remaining: Remaining,
        diversity: Callable[[NeuronSet], float] | None = None,
        before: Sequence[float] = (0.9, 0.95, 0.9, 0.9),
    ) -> None:
        self.places = tuple(range(len(before)))
        self.samples = 0
        self._remaining, self._diversity, self._before = remaining, diversity, tuple(before)
        self.made: dict[NeuronSet, set[int]] = {}

    @property
    def generated(self) -> int:
        return sum(len(places) for neurons, places in self.made.items() if len(neurons))

    def known(self, neurons: NeuronSet) -> tuple[int, ...]:
        return tuple(sorted(self.made.get(neurons, ())))

    def before(self) -> tuple[float, ...]:
        self._make(NeuronSet(), self.places)
        return self._before

    def remaining(self, neurons: NeuronSet, places: Sequence[int]) -> tuple[float, ...]:
        self._make(neurons, places)
        return tuple(self._remaining(neurons, place) for place in places)

    def diversity(self, neurons: NeuronSet) -> tuple[float, ...]:
        self._make(neurons, self.places)
        return tuple(itertools.repeat(0.1 if self._diversity is None else self._diversity(neurons), len(self.places)))

    def with_originals(self, neurons: NeuronSet, places: Sequence[int]) -> tuple[float, ...]:
        return self.remaining(neurons, places)

    def nearest(self, neurons: NeuronSet, originals: Mapping[str, Tensor]) -> list[tuple[str, float]]:
        names = itertools.cycle(originals)
        return [(next(names), value) for value in self.remaining(neurons, self.places)]

    def _make(self, neurons: NeuronSet, places: Sequence[int]) -> None:
        self.made.setdefault(neurons, set()).update(places)
        self.samples = 20 * sum(map(len, self.made.values()))
