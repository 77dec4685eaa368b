"""The probe: remaining memorization, decided with as few runs as possible."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from tiny_pipeline import DOWN_AND_MID, Planted

from nemo_ext.errors import NemoError
from nemo_ext.measure.noise import noise_differences
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import MemorizationScore
from nemo_ext.measure.similarity import similarity
from nemo_ext.models.text import encode_prompts
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patched
from nemo_ext.search.answers import Answers
from nemo_ext.search.probe import NoiseProbe
from nemo_ext.search.runs import Runs, Trial

MakeRuns = Callable[..., Runs]
FIRST, *_, MID = DOWN_AND_MID
PAPER = Protocol.paper()
# Of a similarity, where the denoiser has another number of rows: PyTorch then adds in another order.
ROUNDING = 1e-4


class FakeAnswers(Answers):
    """Answers from a function instead of a denoiser; keeps what was asked for, call by call."""

    def __init__(self, similarity: Callable[[Trial], float], room: Callable[[], int] = lambda: 0) -> None:
        self._known: dict[NeuronSet, dict[int, float]] = {}
        self.similarity = similarity
        self.room = room
        self.calls: list[list[Trial]] = []

    def of(self, neurons: NeuronSet) -> Mapping[int, float]:
        return self._known.get(neurons, {})

    def find(self, wanted: Sequence[Trial], ahead: Sequence[Trial] = (), limit: float = math.inf) -> None:
        unknown = [trial for trial in wanted if trial.seed not in self.of(trial.neurons)]
        also = [trial for trial in ahead if trial.seed not in self.of(trial.neurons)]
        if unknown:
            self.calls.append([*unknown, *also[: self.room()]])
            for trial in self.calls[-1]:
                self._known.setdefault(trial.neurons, {})[trial.seed] = self.similarity(trial)


class TestRemaining:
    def test_is_the_highest_similarity_to_the_untouched_model(self, planted: Planted, make_runs: MakeRuns) -> None:
        some = NeuronSet({MID: [31], FIRST: [7]})
        probe = NoiseProbe(make_runs())
        text = encode_prompts(planted.pipe, [planted.memorized_prompt])
        remaining = probe.remaining(some)
        with patched(planted.pipe, some):
            blocked = noise_differences(planted.pipe, text, probe.runs.latents, PAPER)
        assert remaining == pytest.approx(similarity(probe.runs.untouched(), blocked, PAPER).max().item(), abs=1e-6)

    def test_is_low_with_the_planted_neurons_off_and_high_with_others(
        self, planted: Planted, make_runs: MakeRuns
    ) -> None:
        probe = NoiseProbe(make_runs())
        assert probe.remaining(planted.neurons) < 0.3
        assert probe.remaining(planted.decoys) > 0.9

    def test_of_no_neurons_is_1_without_a_run(self, make_runs: MakeRuns) -> None:
        probe = NoiseProbe(make_runs())
        assert probe.remaining(NeuronSet()) == 1
        assert probe.runs.samples == 0

    def test_asks_for_no_set_twice(self, planted: Planted, make_runs: MakeRuns) -> None:
        probe = NoiseProbe(make_runs(seeds=3))
        probe.score()
        assert probe.runs.samples == 3
        first = probe.remaining(planted.neurons)
        assert probe.runs.samples == 6
        assert probe.remaining(planted.neurons) == first
        assert probe.runs.samples == 6

    def test_only_kept_seeds_run_and_are_compared(
        self, planted: Planted, make_runs: MakeRuns, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs = torch.eye(4, dtype=torch.float64)
        for (first, second), value in {(0, 1): 0.5, (0, 2): 0.75, (1, 3): 0.25}.items():
            pairs[first, second] = pairs[second, first] = value
        monkeypatch.setattr(NoiseProbe, "score", lambda self: MemorizationScore(pairs))
        probe = NoiseProbe(make_runs(seeds=4))
        assert probe.score().per_seed == (0.75, 0.5, 0.75, 0.25)
        assert probe.keep_above(0.5) == (0, 2)
        probe.remaining(planted.neurons)
        assert probe.runs.samples == 4 + 2

    def test_without_a_kept_seed_nothing_can_remain(self, planted: Planted, make_runs: MakeRuns) -> None:
        probe = NoiseProbe(make_runs())
        assert probe.keep_above(1.0) == ()
        with pytest.raises(NemoError, match="no seed is kept"):
            probe.remaining(planted.neurons)

    @pytest.mark.parametrize("seed", range(30))
    def test_stopping_early_decides_as_the_maximum_does(self, seed: int, make_runs: MakeRuns) -> None:
        """On random similarities, asked in any order, with thresholds that are some seed's similarity exactly."""
        rng = random.Random(seed)
        sets = [NeuronSet({MID: [index]}) for index in range(12)]
        table = {neurons: [rng.randrange(8) / 8 for _ in range(5)] for neurons in sets}
        probe = NoiseProbe(make_runs(seeds=5))
        probe.answers = answers = FakeAnswers(lambda trial: table[trial.neurons][trial.seed], lambda: rng.randrange(3))
        for neurons in rng.choices(sets, k=40):
            threshold = rng.randrange(9) / 8
            exact = max(table[neurons])
            ahead = rng.sample([other for other in sets if other != neurons], 2)
            assert (probe.remaining(neurons, stop_above=threshold, ahead=ahead) <= threshold) == (exact <= threshold)
            below = math.nextafter(threshold, -math.inf)
            assert (probe.remaining(neurons, stop_above=below, ahead=ahead) < threshold) == (exact < threshold)
            assert probe.remaining(neurons, stop_above=threshold) <= exact
            if rng.random() < 0.3:
                assert probe.remaining(neurons) == exact
        asked = [trial for call in answers.calls for trial in call]
        assert len(set(asked)) == len(asked)


class TestOrder:
    @staticmethod
    def probe(make_runs: MakeRuns) -> tuple[NoiseProbe, FakeAnswers]:
        """Of four seeds only the third is ever above."""
        probe = NoiseProbe(make_runs(seeds=4))
        probe.answers = answers = FakeAnswers(lambda trial: 0.9 if trial.seed == 2 else 0.1)
        return probe, answers

    def test_the_seed_that_was_highest_last_runs_first(self, make_runs: MakeRuns) -> None:
        probe, answers = self.probe(make_runs)
        for index in range(3):
            assert probe.remaining(NeuronSet({MID: [index]}), stop_above=0.5) == 0.9
        assert [[trial.seed for trial in call] for call in answers.calls] == [[0], [1, 2, 3], [2], [2]]
        assert probe.likeliest() == (2,)
        assert probe.likeliest(besides=(2,)) == (0,)

    def test_a_question_that_is_answered_from_the_cache_changes_nothing(self, make_runs: MakeRuns) -> None:
        """So the cost of a search does not depend on what was asked again before it."""
        first, second = NeuronSet({MID: [0]}), NeuronSet({MID: [1]})
        highest = {first: 2, second: 3}
        calls = []
        for again in ((), (first, second, first)):
            probe = NoiseProbe(make_runs(seeds=4))
            probe.answers = answers = FakeAnswers(
                lambda trial: 0.9 if highest.get(trial.neurons, 1) == trial.seed else 0.1
            )
            for neurons in (first, second, *again):
                assert probe.remaining(neurons, stop_above=0.5) == 0.9
            assert probe.likeliest() == (3,)
            probe.remaining(NeuronSet({MID: [2]}), stop_above=0.5)
            calls.append(answers.calls)
        assert calls[0] == calls[1]

    def test_the_hardest_seed_of_a_set_is_the_highest_that_is_known(self, make_runs: MakeRuns) -> None:
        probe, _ = self.probe(make_runs)
        neurons = NeuronSet({MID: [0]})
        assert probe.hardest(neurons) == ()
        probe.remaining(neurons)
        assert probe.hardest(neurons) == (2,)

    def test_with_an_inferred_data_range_all_seeds_run_together(self, make_runs: MakeRuns) -> None:
        probe, answers = self.probe(make_runs)
        probe.runs.protocol = Protocol.published_code()
        assert probe.remaining(NeuronSet({MID: [0]}), stop_above=0.05, ahead=[NeuronSet({MID: [1]})]) == 0.9
        assert [[trial.seed for trial in call] for call in answers.calls] == [[0, 1, 2, 3]]
        assert probe.likeliest() == probe.hardest(NeuronSet({MID: [0]})) == (2, 0, 1, 3)

    def test_only_the_named_seeds_are_asked(self, make_runs: MakeRuns) -> None:
        probe, answers = self.probe(make_runs)
        assert probe.remaining(NeuronSet({MID: [0]}), seeds=(0, 3)) == 0.1
        assert [[trial.seed for trial in call] for call in answers.calls] == [[0, 3]]


class TestAhead:
    def test_a_set_ahead_takes_what_room_a_batch_has_and_does_not_run_again(
        self, planted: Planted, make_runs: MakeRuns
    ) -> None:
        """Three seeds in batches of two leave room for one more row, whose neurons are others."""
        sets = [planted.decoys, planted.neurons, NeuronSet({MID: [0]})]
        probe, alone = (NoiseProbe(make_runs(seeds=3, batch_size=size)) for size in (2, 1))
        first = probe.remaining(sets[0], ahead=sets[1:])
        assert probe.runs.samples == 3 + 3 + 1
        second = probe.remaining(sets[1])
        assert probe.runs.samples == 3 + 3 + 3
        assert [first, second] == pytest.approx([alone.remaining(one, ahead=sets) for one in sets[:2]], abs=ROUNDING)
        assert second < 0.3 < 0.9 < first
        assert alone.runs.samples == 3 + 3 + 3

    def test_a_set_that_is_named_ahead_of_itself_or_twice_runs_once(self, make_runs: MakeRuns) -> None:
        probe = NoiseProbe(make_runs())
        one, other = NeuronSet({MID: [0]}), NeuronSet({MID: [1]})
        probe.remaining(one, stop_above=-1.0, ahead=[one, other, other, NeuronSet()])
        assert probe.runs.samples == 3 + 2
