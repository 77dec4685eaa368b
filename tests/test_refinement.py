"""Refinement: what is switched on again, in what order, and what the certificate says of the rest."""

import copy
import itertools
import json
import random
from collections.abc import Sequence

import pytest
from fake_probe import FakeProbe, Score, additive, pairwise

from nemo_ext.neurons import NeuronSet
from nemo_ext.refinement import certify, refine_exhaustive, refine_guided
from nemo_ext.results.record import Certificate, NeuronScore

LAYERS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0")
DOWN, _, MID, _ = LAYERS


def refined_by_the_published_procedure(candidates: dict[str, list[int]], score: Score, threshold: float) -> NeuronSet:
    """The published script's two loops over lists, duplicates included."""
    blocked = [list(candidates[layer]) for layer in LAYERS]

    def ssim(indices: list[list[int]]) -> float:
        return score(NeuronSet(dict(zip(LAYERS, indices, strict=True))))

    for layer in reversed(range(len(LAYERS))):
        if blocked[layer]:
            current = copy.deepcopy(blocked)
            current[layer] = []
            if ssim(current) < threshold:
                blocked[layer] = []
    for layer in reversed(range(len(LAYERS))):
        for neuron in list(blocked[layer]):
            current = copy.deepcopy(blocked)
            current[layer].remove(neuron)
            if ssim(current) < threshold:
                blocked[layer].remove(neuron)
    return NeuronSet(dict(zip(LAYERS, blocked, strict=True)))


def random_candidates(rng: random.Random, duplicates: bool) -> dict[str, list[int]]:
    chosen = {layer: rng.sample(range(9), rng.randrange(5)) for layer in LAYERS}
    if duplicates:
        for indices in chosen.values():
            indices += rng.sample(indices, rng.randrange(len(indices) + 1))
    return chosen


def random_score(rng: random.Random, kind: str) -> Score:
    neurons = list(itertools.product(LAYERS, range(9)))
    weights = {neuron: max(0.0, rng.gauss(-0.05, 0.15)) for neuron in neurons}
    if kind == "monotone":
        return additive(weights)
    if kind == "pairwise":
        return pairwise(weights, {frozenset(pair): rng.gauss(0, 0.05) for pair in itertools.combinations(neurons, 2)})
    table: dict[NeuronSet, float] = {}
    return lambda asked: table.setdefault(asked, random.Random(repr((asked, weights))).random())


class TestExhaustive:
    def test_keeps_exactly_what_is_needed(self) -> None:
        probe = FakeProbe(additive({(DOWN, 1): 0.4, (MID, 2): 0.4}))
        refinement = refine_exhaustive({DOWN: [0, 1], MID: [2, 3], LAYERS[3]: [4]}, probe, 0.5)
        assert refinement.neurons == NeuronSet({DOWN: [1], MID: [2]})
        assert refinement.remaining == pytest.approx(0.2)

    def test_goes_layers_first_then_neurons_deepest_first(self) -> None:
        probe = FakeProbe(lambda neurons: 1.0)
        candidates = NeuronSet({DOWN: [0, 1], MID: [2, 3]})
        refine_exhaustive(candidates, probe, 0.5)
        switched_on = [candidates - asked for asked in probe.asked]
        assert switched_on[:-1] == [
            NeuronSet({MID: [2, 3]}),
            NeuronSet({DOWN: [0, 1]}),
            NeuronSet({MID: [2]}),
            NeuronSet({MID: [3]}),
            NeuronSet({DOWN: [0]}),
            NeuronSet({DOWN: [1]}),
        ]

    def test_of_equal_neurons_the_shallower_and_later_stay(self) -> None:
        """Any one of the four is enough; the deepest are tried first, and so the last one tried stays."""
        probe = FakeProbe(lambda neurons: 0.1 if len(neurons) else 1.0)
        refinement = refine_exhaustive({DOWN: [0, 1], MID: [2, 3]}, probe, 0.5)
        assert refinement.neurons == NeuronSet({DOWN: [1]})

    def test_a_trial_equal_to_the_threshold_does_not_switch_on(self) -> None:
        probe = FakeProbe(lambda neurons: 0.5)
        assert refine_exhaustive({MID: [2]}, probe, 0.5).neurons == NeuronSet({MID: [2]})

    def test_needs_at_most_one_trial_a_layer_and_one_a_candidate(self) -> None:
        trials: list[int] = []
        candidates = NeuronSet({layer: range(5) for layer in LAYERS})
        probe = FakeProbe(lambda neurons: 1.0)
        refine_exhaustive(candidates, probe, 0.5, on_trial=lambda: trials.append(1))
        assert len(trials) == len(LAYERS) + len(candidates) == len(probe.asked) - 1

    def test_no_candidates_are_no_neurons(self) -> None:
        assert refine_exhaustive({}, FakeProbe(lambda neurons: 1.0), 0.5).neurons == NeuronSet()

    def test_leaves_its_candidates_alone(self) -> None:
        candidates = {MID: [2, 3]}
        refine_exhaustive(candidates, FakeProbe(lambda neurons: 0.0), 0.5)
        assert candidates == {MID: [2, 3]}

    def test_published_duplicates_below_the_threshold_cost_a_trial_and_change_nothing(self) -> None:
        probe = FakeProbe(additive({(MID, 2): 0.8}))
        assert refine_exhaustive({MID: [2, 3, 3, 2]}, probe, 0.5).neurons == NeuronSet({MID: [2]})

    def test_published_duplicates_at_a_raised_threshold_hide_a_needless_neuron(self) -> None:
        """Switching one of the two on changes nothing, and nothing is not below the threshold reached."""
        score = additive({(MID, 2): 0.2})
        raised = score(NeuronSet({MID: [2, 3]}))
        assert refine_exhaustive({MID: [2, 3, 3]}, FakeProbe(score), raised).neurons == NeuronSet({MID: [2, 3]})

    @pytest.mark.parametrize("kind", ["monotone", "pairwise", "lawless"])
    @pytest.mark.parametrize("duplicates", [False, True])
    @pytest.mark.parametrize("seed", range(20))
    def test_is_the_published_procedure_on_any_score(self, kind: str, duplicates: bool, seed: int) -> None:
        rng = random.Random(seed)
        candidates, score = random_candidates(rng, duplicates), random_score(rng, kind)
        # Half of the time the threshold that the whole selection just reaches, as when it is raised.
        threshold = score(NeuronSet(candidates)) if seed % 2 else rng.random()
        expected = refined_by_the_published_procedure(candidates, score, threshold)
        refinement = refine_exhaustive(candidates, FakeProbe(score), threshold)
        assert refinement.neurons == expected
        assert refinement.remaining == score(expected)

    @pytest.mark.parametrize("seed", range(20))
    def test_a_monotone_score_leaves_a_minimal_set_below_the_threshold(self, seed: int) -> None:
        rng = random.Random(seed)
        candidates, score = NeuronSet(random_candidates(rng, False)), random_score(rng, "monotone")
        threshold = score(candidates) + 0.1
        probe = FakeProbe(score)
        certificate = certify(refine_exhaustive(candidates, probe, threshold).neurons, probe, threshold)
        assert certificate.below_threshold
        assert certificate.minimal


class SeedsProbe:
    """A score for each seed; evaluates as many as it wants, like `NoiseProbe`."""

    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores
        self.first = 0
        self.trials: set[tuple[NeuronSet, int]] = set()

    def remaining(
        self, neurons: NeuronSet, enough: float | None = None, seeds: list[int] | None = None, ahead: object = ()
    ) -> float:
        looked_at = range(len(self.scores)) if seeds is None else seeds
        self.trials |= {(neurons, seed) for seed in looked_at}
        values = {seed: self.scores[seed](neurons) for seed in looked_at}
        highest = max(values, key=lambda seed: values[seed])
        if enough is not None and values[highest] > enough:
            self.first = highest
        return values[highest]

    def likeliest(self, besides: Sequence[int] = ()) -> tuple[int, ...]:
        order = sorted(range(len(self.scores)), key=lambda seed: seed != self.first)
        return tuple(seed for seed in order if seed not in besides)[:1]


PAIRS = [(layer, index) for layer in LAYERS for index in range(9)]


class TestGuided:
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


class TestCertificate:
    def test_says_what_each_neuron_does(self) -> None:
        probe = FakeProbe(additive({(DOWN, 1): 0.4, (MID, 2): 0.35}))
        assert certify(NeuronSet({MID: [2], DOWN: [1]}), probe, 0.5) == Certificate(
            threshold=0.5,
            score=pytest.approx(0.25),
            each_on=(NeuronScore(DOWN, 1, pytest.approx(0.65)), NeuronScore(MID, 2, pytest.approx(0.6))),
            below_threshold=True,
            minimal=True,
        )

    def test_tells_that_an_exhaustive_result_is_not_minimal(self) -> None:
        """With 3 and 4 off neuron 2 was needed; then 3 was switched on, and now it is not."""
        scores = {(2, 3, 4): 0.1, (3, 4): 0.9, (2, 4): 0.3, (2,): 0.9, (4,): 0.2, (): 1.0}
        probe = FakeProbe(lambda neurons: scores[neurons.get(MID, ())])
        refinement = refine_exhaustive({MID: [2, 3, 4]}, probe, 0.5)
        assert refinement.neurons == NeuronSet({MID: [2, 4]})
        certificate = certify(refinement.neurons, probe, 0.5)
        assert certificate.each_on == (NeuronScore(MID, 2, 0.2), NeuronScore(MID, 4, 0.9))
        assert certificate.below_threshold
        assert not certificate.minimal

    def test_of_a_set_that_is_not_enough_says_so(self) -> None:
        certificate = certify(NeuronSet({MID: [2]}), FakeProbe(lambda neurons: 0.9), 0.5)
        assert not certificate.below_threshold
        assert certificate.minimal

    def test_of_no_neurons_is_minimal_and_above_the_threshold(self) -> None:
        certificate = certify(NeuronSet(), FakeProbe(lambda neurons: 1.0), 0.5)
        assert (certificate.score, certificate.each_on) == (1.0, ())
        assert certificate.minimal
        assert not certificate.below_threshold

    def test_round_trip(self) -> None:
        certificate = certify(NeuronSet({MID: [2, 3]}), FakeProbe(lambda neurons: len(neurons) / 10), 0.5)
        assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
