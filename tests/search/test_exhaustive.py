"""The exhaustive refinement: what is switched on again, and in what order."""

import copy
import random

import pytest
from fake_probe import LAYERS, FakeProbe, Score, additive, random_candidates, random_score

from nemo_ext.neurons import NeuronSet
from nemo_ext.search.certificate import certify
from nemo_ext.search.exhaustive import refine_exhaustive

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


class TestRefinement:
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
