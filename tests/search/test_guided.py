"""The guided refinement: bisection over an order, for the seeds that need it."""

import random

import pytest
from fake_probe import LAYERS, PAIRS, FakeProbe, SeedsProbe, additive, random_score

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.certificate import certify
from nemo_ext.search.guided import refine_guided

DOWN, _, MID, _ = LAYERS


class TestRefinement:
    def test_finds_what_is_needed_in_the_front_of_a_long_order(self) -> None:
        order = [(MID, index) for index in range(1000)]
        probe = FakeProbe(additive({(MID, 1): 0.4, (MID, 5): 0.4}))
        refinement = refine_guided(lambda seeds: order, probe, 0.5)
        assert refinement.neurons == NeuronSet({MID: [1, 5]})
        assert refinement.remaining == pytest.approx(0.2)
        assert len(probe.asked) < 25

    def test_a_single_neuron_at_the_front_takes_two_trials_and_the_proof(self) -> None:
        probe = FakeProbe(additive({(MID, 3): 0.8}))
        refinement = refine_guided(lambda seeds: [(MID, 3), (MID, 1), (DOWN, 0)], probe, 0.5)
        assert refinement.neurons == NeuronSet({MID: [3]})
        assert len({*probe.asked} - {NeuronSet()}) == 2  # all of them, and this one

    def test_what_the_floor_does_not_allow_takes_one_trial_to_see(self) -> None:
        probe = FakeProbe(lambda neurons: 0.9)
        refinement = refine_guided(lambda seeds: PAIRS, probe, 0.5)
        assert len(refinement.neurons) == len(PAIRS)
        assert refinement.remaining == 0.9
        assert len(set(probe.asked)) == 1

    def test_a_seed_that_needs_more_is_searched_for_as_well(self) -> None:
        ranked_for: list[tuple[int, ...]] = []

        def ranked(seeds: tuple[int, ...]) -> list[tuple[str, int]]:
            ranked_for.append(tuple(seeds))
            return PAIRS

        probe = SeedsProbe([additive({(DOWN, 0): 0.8}), additive({(DOWN, 0): 0.3, (MID, 4): 0.3})])
        refinement = refine_guided(ranked, probe, 0.5)
        assert refinement.neurons == NeuronSet({DOWN: [0], MID: [4]})
        assert ranked_for == [(0,), (1,), (0,)]  # of the second seed's order the first eight were not enough

    def test_another_seed_is_asked_where_the_front_of_an_order_is_not_enough(self) -> None:
        """The first seed's effects put the one neuron that is needed last."""
        orders = {0: PAIRS[::-1], 1: PAIRS}
        probe = SeedsProbe([additive({PAIRS[0]: 0.8})] * 2)
        refinement = refine_guided(lambda seeds: orders[seeds[0]], probe, 0.5)
        assert refinement.neurons == NeuronSet({PAIRS[0][0]: [PAIRS[0][1]]})
        assert len({neurons for neurons, _ in probe.trials} - {NeuronSet()}) == 4  # all, both fronts, the one

    @pytest.mark.parametrize("kind", ["monotone", "pairwise", "lawless"])
    @pytest.mark.parametrize("seed", range(20))
    def test_on_any_score_the_set_is_enough_and_1_minimal(self, kind: str, seed: int) -> None:
        rng = random.Random(seed)
        scores = [random_score(rng, kind) for _ in range(3)]
        order = rng.sample(PAIRS, len(PAIRS))
        probe = SeedsProbe(scores)
        everything = NeuronSet({layer: range(9) for layer in LAYERS})
        threshold = max(score(everything) for score in scores) + 0.2
        refinement = refine_guided(lambda seeds: order, probe, threshold)
        certificate = certify(refinement.neurons, probe, threshold)
        assert refinement.remaining == max(score(refinement.neurons) for score in scores) <= threshold
        assert certificate.below_threshold
        assert certificate.minimal
