"""Initial selection: which neurons are candidates, and how θ and k move until switching them off is enough."""

import dataclasses
import random

import pytest
import torch
from fake_probe import FakeProbe, Score, SeedsProbe
from fake_task import STATISTICS, fake_task

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.outcome import Task
from nemo_ext.search.selection import candidates, initial_selection, select_candidates

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


ACTIVATION = {"a": torch.tensor([5.0, 1.0, 9.0, 7.0])}
Z_SCORES = {"a": torch.tensor([0.0, 6.0, 3.0, 3.1])}


class TestCandidates:
    @pytest.mark.parametrize(
        ("theta", "top_k", "expected"),
        [
            (5.0, 0, (1,)),
            (3.0, 0, (1, 3)),
            (3.0, 1, (1, 2, 3)),
            (9.0, 2, (2, 3)),
            (9.0, 99, (0, 1, 2, 3)),
            (6.0, 0, ()),
        ],
    )
    def test_are_those_above_theta_and_the_k_most_active(
        self, theta: float, top_k: int, expected: tuple[int, ...]
    ) -> None:
        assert candidates(ACTIVATION, Z_SCORES, theta=theta, top_k=top_k) == {"a": expected}

    def test_published_code_lists_both_kinds_one_after_the_other_with_duplicates(self) -> None:
        chosen = candidates(ACTIVATION, Z_SCORES, theta=3.0, top_k=2, keeps_duplicates=True)
        assert chosen == {"a": (1, 3, 2, 3)}

    def test_of_equally_active_neurons_the_first_counts_as_more_active(self) -> None:
        activation = {"a": torch.ones(40)}
        assert candidates(activation, {"a": torch.zeros(40)}, theta=1.0, top_k=3) == {"a": (0, 1, 2)}


class TestTheSearch:
    def test_stops_at_the_first_selection_that_is_enough(self) -> None:
        """Neuron 1 is chosen once θ < 4.6, at 4.5; neuron 0 is the most active from k = 1 on."""
        activation = {"a": torch.tensor([4.6, 4.55] + [0.0] * 20)}
        probe = FakeProbe(lambda neurons: 0.2 if len(neurons) >= 2 else 0.9)
        selection = initial_selection(activation, STATISTICS, probe, 0.4, protocol=PAPER)
        assert (selection.theta, selection.top_k) == (4.5, 2)
        assert selection.neurons == NeuronSet({"a": [0, 1]})
        assert (selection.remaining, selection.threshold) == (0.2, 0.4)
        assert [len(asked) for asked in probe.asked] == [0, 1, 2]

    def test_a_remaining_memorization_equal_to_the_threshold_is_enough(self) -> None:
        probe = FakeProbe(lambda neurons: 0.4)
        selection = initial_selection({"a": torch.tensor([9.0])}, STATISTICS, probe, 0.4, protocol=PAPER)
        assert (selection.theta, selection.threshold) == (5.0, 0.4)

    def test_paper_tries_the_last_theta_and_then_raises_the_threshold(self) -> None:
        probe = FakeProbe(lambda neurons: 0.7)
        selection = initial_selection({"a": torch.zeros(64)}, STATISTICS, probe, 0.4, protocol=PAPER)
        assert len(probe.asked) == 17
        assert (selection.theta, selection.top_k) == (1.0, 16)
        assert selection.threshold == pytest.approx(0.71)

    def test_published_code_gives_up_on_reaching_the_last_theta(self) -> None:
        probe = FakeProbe(lambda neurons: 0.7)
        selection = initial_selection({"a": torch.zeros(64)}, STATISTICS, probe, 0.4, protocol=PUBLISHED)
        assert len(probe.asked) == 16
        assert (selection.theta, selection.top_k) == (1.25, 15)
        assert selection.threshold == 0.7

    def test_the_threshold_is_raised_for_all_seeds_although_one_decides_on_candidates(self) -> None:
        probe = SeedsProbe([lambda neurons: 0.7, lambda neurons: 0.8])
        activation = {"a": torch.zeros(64)}
        selection = initial_selection(activation, STATISTICS, probe, 0.4, protocol=PUBLISHED, seeds=(0,))
        assert selection.threshold == 0.8

    @pytest.mark.parametrize(("protocol", "last_k"), [(PAPER, 5), (PUBLISHED, 4)])
    def test_ends_when_k_is_the_widest_layer(self, protocol: Protocol, last_k: int) -> None:
        probe = FakeProbe(lambda neurons: 0.7)
        activation = {"a": torch.zeros(3), "b": torch.zeros(5)}
        assert initial_selection(activation, STATISTICS, probe, 0.4, protocol=protocol).top_k == last_k

    def test_theta_never_falls_below_the_last_one(self) -> None:
        coarse = dataclasses.replace(PAPER, theta_step=1.5)
        probe = FakeProbe(lambda neurons: 0.7)
        selection = initial_selection({"a": torch.zeros(64)}, STATISTICS, probe, 0.4, protocol=coarse)
        assert (selection.theta, len(probe.asked)) == (1.0, 4)

    def test_tells_of_every_trial(self) -> None:
        trials: list[int] = []
        probe = FakeProbe(lambda neurons: 0.7)
        initial_selection(
            {"a": torch.zeros(64)}, STATISTICS, probe, 0.4, protocol=PAPER, on_trial=lambda: trials.append(1)
        )
        assert len(trials) == len(probe.asked)

    def test_without_a_layer_is_refused(self) -> None:
        with pytest.raises(NemoError, match="no layer to select neurons from"):
            initial_selection({}, STATISTICS, FakeProbe(lambda neurons: 1.0), 0.4, protocol=PAPER)


def published_procedure(
    activation: dict[str, list[float]], probe: FakeProbe, threshold: float
) -> tuple[dict[str, list[int]], float]:
    """The published script's loop, word for word where it matters: its blocked indices and its threshold."""
    ssim, theta, k = 1.0, 5.0, 0
    refinement_threshold = threshold
    while ssim > threshold:
        blocked = {}
        for layer, values in activation.items():
            indices = [i for i, value in enumerate(values) if value > theta]
            most_active = sorted(range(len(values)), key=lambda i: -values[i])
            blocked[layer] = indices + most_active[: min(k, len(values))]
        ssim = probe.remaining(NeuronSet(blocked))
        if ssim > threshold:
            if theta > 1:
                theta -= 0.25
            k += 1
        if theta == 1 or k >= max(map(len, activation.values())):
            refinement_threshold = ssim
            break
    return blocked, refinement_threshold


@pytest.mark.parametrize("seed", range(30))
def test_published_protocol_is_the_published_loop(seed: int) -> None:
    """On random activations, and random scores that know no order."""
    rng = random.Random(seed)
    activation = {name: [rng.uniform(0, 6) for _ in range(rng.choice((4, 20, 40)))] for name in "abc"}
    scores: dict[NeuronSet, float] = {}

    def score(neurons: NeuronSet) -> float:
        return scores.setdefault(neurons, rng.random())

    threshold = rng.choice((0.05, 0.2, -1.0))
    expected, expected_threshold = published_procedure(activation, FakeProbe(score), threshold)
    tensors = {layer: torch.tensor(values, dtype=torch.float64) for layer, values in activation.items()}
    selection = initial_selection(tensors, STATISTICS, FakeProbe(score), threshold, protocol=PUBLISHED)
    assert {layer: list(indices) for layer, indices in selection.candidates.items()} == expected
    assert selection.threshold == expected_threshold


class TestFloor:
    """`select_candidates` measures the floor first, or only when the first candidates are not enough."""

    @staticmethod
    def task(score: Score, threshold: float, protocol: Protocol = PAPER) -> tuple[Task, FakeProbe]:
        probe = FakeProbe(score)
        return fake_task(probe, {"a": [9.0, *[0.0] * 63]}, threshold, protocol), probe

    @pytest.mark.parametrize(("floor_first", "asked"), [(True, [64, 1]), (False, [1])])
    def test_is_not_needed_where_the_first_candidates_are_enough(self, floor_first: bool, asked: list[int]) -> None:
        task, probe = self.task(lambda neurons: 0.1, 0.4)
        selection, floor, notes = select_candidates(task, floor_first=floor_first)
        assert [len(neurons) for neurons in probe.asked] == asked
        assert (len(selection.neurons), floor, notes) == (1, 0.1 if floor_first else None, ())

    @pytest.mark.parametrize("floor_first", [True, False])
    def test_above_the_threshold_raises_it_for_the_same_candidates(self, floor_first: bool) -> None:
        task, _ = self.task(lambda neurons: 0.5, 0.4)
        selection, floor, notes = select_candidates(task, floor_first=floor_first)
        assert (selection.theta, floor, selection.threshold) == (PAPER.first_theta, 0.5, 0.5 + PAPER.raise_margin)
        assert len(notes) == 1
        assert "with all 64 searched neurons off the similarity is still 0.500" in notes[0]

    @pytest.mark.parametrize("floor_first", [True, False])
    def test_below_the_threshold_changes_nothing(self, floor_first: bool) -> None:
        task, _ = self.task(lambda neurons: 0.9 if len(neurons) < 4 else 0.1, 0.4)
        selection, floor, notes = select_candidates(task, floor_first=floor_first)
        assert (selection.top_k, floor, selection.threshold, notes) == (4, 0.1, 0.4, ())

    @pytest.mark.parametrize("floor_first", [True, False])
    def test_is_not_measured_if_the_protocol_says_so(self, floor_first: bool) -> None:
        task, probe = self.task(lambda neurons: 0.9 if len(neurons) < 4 else 0.1, 0.4, PUBLISHED)
        assert select_candidates(task, floor_first=floor_first).floor is None
        assert all(len(neurons) < 64 for neurons in probe.asked)
