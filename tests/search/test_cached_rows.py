"""Cached rows: the latest entry point that a cached run allows, and how many runs the memory has room for."""

import pytest
import torch
from planted_runs import find_entry_points
from tiny_pipeline import DOWN_AND_MID, Planted

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.cached_rows import CachedRows
from nemo_ext.search.partial_unet import FULL_RUN, EntryPoints

LAYERS = list(DOWN_AND_MID)
FIRST, SECOND, *_, MID = LAYERS
LAST = len(LAYERS) - 1
NONE, ONE, OTHER = NeuronSet(), NeuronSet({SECOND: [1]}), NeuronSet({SECOND: [2]})


@pytest.fixture(scope="module")
def entry_points(planted: Planted) -> EntryPoints:
    return find_entry_points(planted, LAYERS)


@pytest.fixture
def cache(entry_points: EntryPoints) -> CachedRows:
    """Room for two sets of each of two seeds."""
    return CachedRows(entry_points, seeds=2, memory=2 * 2 * entry_points.row_bytes)


def row(number: int) -> dict[str, torch.Tensor]:
    """A row that can be told from others."""
    return {"a module": torch.full((1,), float(number))}


def test_without_a_cached_run_everything_runs(cache: CachedRows) -> None:
    assert cache.entry(0, ONE) == (FULL_RUN, {})


def test_the_entry_is_before_the_first_layer_with_other_neurons_off(cache: CachedRows) -> None:
    cache.keep(0, NONE, row(1))
    assert cache.entry(0, NeuronSet({MID: [0]})) == (LAST, row(1))
    assert cache.entry(0, NeuronSet({SECOND: [1], MID: [0]})) == (1, row(1))
    assert cache.entry(0, NeuronSet({FIRST: [1]})) == (0, row(1))


def test_the_run_that_allows_the_latest_entry_is_taken(cache: CachedRows) -> None:
    cache.keep(0, NONE, row(1))
    cache.keep(0, ONE, row(2))
    assert cache.entry(0, NeuronSet({SECOND: [1], MID: [0]})) == (LAST, row(2))
    assert cache.entry(0, OTHER) == (1, row(2))  # both allow it: the one that was cached last


def test_of_the_same_neurons_only_the_last_layer_runs(cache: CachedRows) -> None:
    cache.keep(0, ONE, row(1))
    assert cache.entry(0, ONE) == (LAST, row(1))


def test_seeds_do_not_share_rows(cache: CachedRows) -> None:
    cache.keep(0, NONE, row(1))
    assert cache.entry(1, ONE) == (FULL_RUN, {})


def test_the_run_that_was_not_used_for_longest_makes_room(cache: CachedRows) -> None:
    cache.keep(0, NONE, row(1))
    cache.keep(0, ONE, row(2))
    cache.entry(0, NeuronSet({FIRST: [0]}))  # uses the latter of two equally good ones
    cache.entry(0, NONE)
    cache.keep(0, OTHER, row(3))
    assert cache.entry(0, NONE) == (LAST, row(1))
    assert cache.entry(0, ONE)[0] == 1


def test_a_set_of_layers_that_are_no_entry_points_is_neither_cached_nor_found(planted: Planted) -> None:
    """Neurons before the only entry point change what comes in there."""
    entry_points = find_entry_points(planted, [MID])
    cache = CachedRows(entry_points, seeds=1, memory=10 * entry_points.row_bytes)
    cache.keep(0, ONE, row(1))
    assert cache.entry(0, NeuronSet({MID: [0]})) == (FULL_RUN, {})
    cache.keep(0, NONE, row(2))
    assert cache.entry(0, ONE) == (FULL_RUN, {})


def test_without_entry_points_nothing_is_cached_and_all_runs_are_full() -> None:
    cache = CachedRows(None, seeds=1, memory=1 << 30)
    cache.keep(0, NONE, row(1))
    assert cache.entry(0, NONE) == (FULL_RUN, {})
    assert cache.share(FULL_RUN) == 1
    with cache.entering(FULL_RUN, [{}, {}]) as recorded:
        pass
    assert recorded == [{}, {}]


def test_shares_are_those_of_the_entry_points(cache: CachedRows, entry_points: EntryPoints) -> None:
    assert [cache.share(place) for place in range(len(LAYERS))] == list(entry_points.shares)
    assert cache.share(FULL_RUN) == 1
