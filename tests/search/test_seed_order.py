"""The order of seeds: it follows what evaluations have shown, and nothing else."""

from nemo_ext.search.seed_order import SeedOrder


def test_begins_as_it_was_given() -> None:
    assert SeedOrder((2, 0, 1)).among() == (2, 0, 1)


def test_a_seed_that_failed_comes_first_and_the_others_keep_their_order() -> None:
    order = SeedOrder((0, 1, 2))
    order.failed(2)
    assert order.among() == (2, 0, 1)


def test_after_all_passed_the_closest_comes_first() -> None:
    order = SeedOrder((0, 1, 2))
    order.passed({0: 0.1, 1: 0.3, 2: 0.2})
    assert order.among() == (1, 2, 0)


def test_seeds_that_came_equally_close_keep_their_order() -> None:
    order = SeedOrder((2, 0, 1))
    order.passed({0: 0.5, 1: 0.5, 2: 0.5})
    assert order.among() == (2, 0, 1)


def test_some_of_the_seeds_come_in_the_order_of_all() -> None:
    order = SeedOrder((2, 0, 1))
    assert order.among({1, 2}) == (2, 1)
    assert order.among(()) == ()


def test_asking_changes_nothing() -> None:
    order = SeedOrder((2, 0, 1))
    for seeds in ((1,), (0, 1), None):
        order.among(seeds)
    assert order.among() == (2, 0, 1)
