"""The grouped search: the decisions of the exhaustive one, for groups of candidates at once, by one seed first."""

import random

import pytest
from fake_probe import LAYERS, FakeProbe, SeedsProbe, additive, random_candidates, random_score
from fake_task import fake_task

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.exhaustive import refine_exhaustive, search_exhaustive
from nemo_ext.search.grouped import refine_grouped, search_grouped

DOWN, _, MID, _ = LAYERS


class TestRefinement:
    @pytest.mark.parametrize("duplicates", [False, True])
    @pytest.mark.parametrize("seed", range(60))
    def test_of_a_monotone_score_is_the_exhaustive_one(self, seed: int, duplicates: bool) -> None:
        rng = random.Random(seed)
        candidates, score = random_candidates(rng, duplicates), random_score(rng, "monotone")
        threshold = score(NeuronSet(candidates)) + rng.choice((0.0, 0.05, 0.2, 0.5))
        expected = refine_exhaustive(candidates, FakeProbe(score), threshold)
        assert refine_grouped(candidates, FakeProbe(score), threshold) == expected

    @pytest.mark.parametrize("seed", range(30))
    def test_of_seeds_with_monotone_scores_is_the_exhaustive_one(self, seed: int) -> None:
        """Looking at one seed first changes nothing but the cost."""
        rng = random.Random(seed)
        candidates = random_candidates(rng, False)
        scores = [random_score(rng, "monotone") for _ in range(3)]
        threshold = max(score(NeuronSet(candidates)) for score in scores) + 0.1
        expected = refine_exhaustive(candidates, SeedsProbe(scores), threshold)
        assert refine_grouped(candidates, SeedsProbe(scores), threshold).neurons == expected.neurons

    @pytest.mark.parametrize("kind", ["pairwise", "lawless"])
    @pytest.mark.parametrize("seed", range(30))
    def test_of_any_score_what_stays_off_is_enough_for_all_seeds(self, kind: str, seed: int) -> None:
        rng = random.Random(seed)
        candidates = random_candidates(rng, False)
        scores = [random_score(rng, kind) for _ in range(3)]
        threshold = max(score(NeuronSet(candidates)) for score in scores)
        refinement = refine_grouped(candidates, SeedsProbe(scores), threshold)
        assert refinement.remaining == max(score(refinement.neurons) for score in scores) <= threshold

    def test_few_needed_neurons_among_many_take_few_trials(self) -> None:
        probe = FakeProbe(additive({(MID, 100): 0.4, (MID, 700): 0.4}))
        refinement = refine_grouped({MID: range(1000)}, probe, 0.5)
        assert refinement.neurons == NeuronSet({MID: [100, 700]})
        assert len(set(probe.asked)) < 40

    @pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
    def test_if_every_neuron_is_needed_each_takes_about_one_trial(self, count: int) -> None:
        neurons = NeuronSet({MID: range(count)})
        probe = FakeProbe(lambda asked: 0.1 if asked == neurons else 0.9)
        assert refine_grouped(neurons, probe, 0.5).neurons == neurons
        # One for the layer, one for each neuron, the bisection of the first group, and the check of the set itself.
        assert len(set(probe.asked)) <= 2 + count + count.bit_length()

    def test_a_seed_that_objects_is_looked_at_from_then_on(self) -> None:
        probe = SeedsProbe([additive({(DOWN, 0): 0.8}), additive({(DOWN, 0): 0.3, (MID, 4): 0.3})])
        refinement = refine_grouped({DOWN: [0, 1], MID: [4, 5]}, probe, 0.5)
        assert refinement.neurons == NeuronSet({DOWN: [0], MID: [4]})

    def test_no_candidates_are_no_neurons(self) -> None:
        assert refine_grouped({}, FakeProbe(lambda neurons: 1.0), 0.5).neurons == NeuronSet()

    def test_leaves_its_candidates_alone(self) -> None:
        candidates = {MID: [2, 3]}
        refine_grouped(candidates, FakeProbe(lambda neurons: 0.0), 0.5)
        assert candidates == {MID: [2, 3]}


class TestSearch:
    @pytest.mark.parametrize("seed", range(40))
    def test_of_seeds_with_monotone_scores_is_the_exhaustive_one(self, seed: int) -> None:
        """The same candidates, τ and neurons, where τ is reached and where it is raised, although seeds differ."""
        rng = random.Random(seed)
        activation = {layer: [rng.uniform(0, 6) for _ in range(9)] for layer in LAYERS}
        scores = [random_score(rng, "monotone") for _ in range(3)]
        everything = NeuronSet({layer: range(9) for layer in LAYERS})
        threshold = max(score(everything) for score in scores) + rng.choice((-0.1, 0.01, 0.2, 0.5))
        expected = search_exhaustive(fake_task(SeedsProbe(scores), activation, threshold))
        found = search_grouped(fake_task(SeedsProbe(scores), activation, threshold))
        for name in ("neurons", "initial_neurons", "theta", "top_k", "threshold_used", "score_after"):
            assert getattr(found, name) == getattr(expected, name), name

    def test_measures_its_candidates_on_one_seed_and_its_set_on_all(self) -> None:
        probe = SeedsProbe([additive({(DOWN, 1): 0.8})] * 10)
        found = search_grouped(fake_task(probe, {DOWN: [6.0, 9.0, 7.0]}, 0.5))
        seeds = {neurons: sum(asked == neurons for asked, _ in probe.trials) for neurons, _ in probe.trials}
        assert found.neurons == NeuronSet({DOWN: [1]})
        assert (seeds[found.initial_neurons], seeds[found.neurons]) == (1, 10)

    def test_a_set_that_all_other_seeds_reject_is_measured_on_one_of_them(self) -> None:
        probe = SeedsProbe([additive({(DOWN, 0): 0.8}), *[additive({(MID, 1): 0.8})] * 9])
        found = search_grouped(fake_task(probe, {DOWN: [6.0, 0.0], MID: [0.0, 6.0]}, 0.5))
        assert found.neurons == NeuronSet({DOWN: [0], MID: [1]})
        assert sum(asked == NeuronSet({DOWN: [0]}) for asked, _ in probe.trials) == 2

    def test_candidates_that_are_not_enough_for_another_seed_become_more(self) -> None:
        probe = SeedsProbe([additive({(DOWN, 0): 0.8}), additive({(MID, 1): 0.8})])
        found = search_grouped(fake_task(probe, {DOWN: [6.0, 0.0], MID: [0.0, 4.0]}, 0.5))
        assert found.neurons == found.initial_neurons == NeuronSet({DOWN: [0], MID: [1]})
        assert found.threshold_used == 0.5
