"""What the neuron sets of several prompts have in common."""

import numpy as np
import pytest

from nemo_ext.aggregate import clusters, frequencies, intersection, most_frequent, overlaps
from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet

A = NeuronSet({"down.0": [1, 2], "mid.0": [5]})
B = NeuronSet({"down.0": [2], "mid.0": [5]})
C = NeuronSet({"mid.0": [5, 6]})
D = NeuronSet({"down.0": [9]})
NONE = NeuronSet()


def test_an_intersection_has_what_is_in_every_set() -> None:
    assert intersection([A, B, C]) == NeuronSet({"mid.0": [5]})
    assert intersection([A]) == A
    assert intersection([A, D]) == NONE
    with pytest.raises(NemoError, match="one set of neurons or more"):
        intersection([])


def test_the_most_frequent_neurons_come_first_and_equal_ones_in_network_order() -> None:
    assert list(frequencies([A, B, C, D]).items()) == [
        (("mid.0", 5), 3), (("down.0", 2), 2), (("down.0", 1), 1), (("down.0", 9), 1), (("mid.0", 6), 1),
    ]  # fmt: skip
    assert most_frequent([A, B, C, D], 2) == NeuronSet({"down.0": [2], "mid.0": [5]})
    assert most_frequent([A], 99) == A
    with pytest.raises(NemoError, match="1 or more, got 0"):
        most_frequent([A], 0)


def test_an_overlap_is_the_jaccard_index() -> None:
    found = overlaps([A, B, C, D, NONE])
    assert found.shape == (5, 5)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(found.diagonal(), 1)
    assert found[0, 1] == 2 / 3
    assert found[0, 2] == 1 / 4
    assert found[1, 2] == 1 / 3
    assert not found[3, :3].any()
    assert not found[4, :4].any()


def test_overlaps_of_random_sets_are_those_of_their_definition() -> None:
    chance = np.random.default_rng(0)
    sets = [NeuronSet({"a": sorted(set(chance.integers(0, 30, 8).tolist()))}) for _ in range(20)]
    found = overlaps(sets)
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            assert found[i, j] == pytest.approx(len(one & other) / len(one | other))


def test_prompts_that_share_neurons_are_one_cluster_even_through_a_third() -> None:
    assert clusters([A, D, B, C], 0.3) == [[0, 2, 3], [1]]  # A and C meet in B
    assert clusters([A, D, B, C], 0.5) == [[0, 2], [1], [3]]
    assert clusters([A, D, B, C], 1.0) == [[0], [1], [2], [3]]
    assert clusters([], 0.5) == []


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_an_overlap_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(NemoError, match="above 0 and at most 1"):
        clusters([A], wrong)
