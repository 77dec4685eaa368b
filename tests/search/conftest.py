"""What the tests of the search share: a patched pipeline whose memorizing neurons are known, and runs on it."""

from collections.abc import Callable, Iterator

import pytest
from planted_runs import find_entry_points
from tiny_pipeline import Planted, planted_pipeline

from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.text import encode_prompts
from nemo_ext.patching.patch import PatchHandle, patch_handle
from nemo_ext.search.runs import Runs

MakeRuns = Callable[..., Runs]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture
def handle(planted: Planted) -> Iterator[PatchHandle]:
    """The planted pipeline, patched for one test, with no neuron off."""
    with patch_handle(planted.pipe) as handle:
        yield handle


@pytest.fixture
def make_runs(planted: Planted, handle: PatchHandle) -> MakeRuns:
    """Makes the runs of the memorized prompt: `make_runs(seeds=…, layers=…)`, where `layers` are entry points."""
    text = encode_prompts(planted.pipe, [planted.memorized_prompt])

    def make(seeds: int = 3, layers: list[str] | None = None, batch_size: int | None = None) -> Runs:
        entry_points = None if layers is None else find_entry_points(planted, layers)
        return Runs(
            planted.pipe,
            handle,
            text,
            seeds=seeds,
            protocol=Protocol.paper(),
            batch_size=batch_size,
            entry_points=entry_points,
        )

    return make
