"""Random neurons in the place of the found ones."""

from nemo_ext.evaluate.control import random_neurons
from nemo_ext.neurons import NeuronSet

FOUND = NeuronSet({"down": [0, 3, 7], "mid": [2]})
WIDTHS = {"down": 20, "mid": 20, "up": 20}


def test_each_layer_has_as_many_neurons_and_none_of_the_found_ones() -> None:
    for seed in "abcdefgh":
        drawn = random_neurons(FOUND, WIDTHS, seed=seed)
        assert {layer: len(indices) for layer, indices in drawn.items()} == {"down": 3, "mid": 1}
        assert not drawn & FOUND
        assert max(max(indices) for indices in drawn.values()) < 20


def test_equal_seeds_give_equal_neurons_and_others_do_not() -> None:
    assert random_neurons(FOUND, WIDTHS, seed="1") == random_neurons(FOUND, WIDTHS, seed="1")
    assert len({random_neurons(FOUND, WIDTHS, seed=str(seed)) for seed in range(20)}) > 10


def test_a_layer_with_too_few_others_gives_all_of_them() -> None:
    assert random_neurons(FOUND, {"down": 5, "mid": 20}, seed="1")["down"] == (1, 2, 4)


def test_no_neurons_have_no_control() -> None:
    assert random_neurons(NeuronSet(), WIDTHS, seed="1") == NeuronSet()
