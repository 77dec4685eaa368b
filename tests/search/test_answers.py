"""Answers: the similarity of each trial to its seed's untouched δ, computed once."""

from collections.abc import Callable

import pytest
from tiny_pipeline import DOWN_AND_MID, Planted

from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.answers import Answers
from nemo_ext.search.runs import Runs, Trial

MakeRuns = Callable[..., Runs]
FIRST, *_, MID = DOWN_AND_MID


def test_nothing_is_known_at_first(make_runs: MakeRuns) -> None:
    runs = make_runs()
    assert Answers(runs).of(NeuronSet({MID: [0]})) == {}
    assert runs.samples == 0


def test_are_similarities_to_the_untouched_model(planted: Planted, make_runs: MakeRuns) -> None:
    runs = make_runs()
    answers = Answers(runs)
    trials = [Trial(seed, planted.neurons) for seed in (0, 2)]
    answers.find(trials)
    expected = [
        similarity(runs.untouched()[[run.trial.seed]], run.difference, Protocol.paper()).item()
        for run in make_runs().of(trials)
    ]
    assert list(answers.of(planted.neurons)) == [0, 2]
    assert list(answers.of(planted.neurons).values()) == pytest.approx(expected, abs=1e-4)


def test_no_trial_runs_twice(planted: Planted, make_runs: MakeRuns) -> None:
    runs = make_runs(seeds=3)
    answers = Answers(runs)
    answers.find([Trial(0, planted.neurons)])
    before = dict(answers.of(planted.neurons))
    answers.find([Trial(0, planted.neurons), Trial(1, planted.neurons)])
    assert runs.samples == 3 + 2
    answers.find([Trial(0, planted.neurons), Trial(1, planted.neurons)])
    assert runs.samples == 3 + 2
    assert answers.of(planted.neurons)[0] == before[0]


def test_trials_ahead_become_known_where_a_batch_has_room(planted: Planted, make_runs: MakeRuns) -> None:
    runs = make_runs(seeds=3, batch_size=2)
    answers = Answers(runs)
    ahead = [Trial(0, NeuronSet({MID: [place]})) for place in (0, 1)]
    answers.find([Trial(0, planted.neurons)], ahead)
    assert [len(answers.of(trial.neurons)) for trial in ahead] == [1, 0]


def test_trials_ahead_never_run_by_themselves(planted: Planted, make_runs: MakeRuns) -> None:
    runs = make_runs()
    answers = Answers(runs)
    answers.find([], [Trial(0, planted.neurons)])
    assert runs.samples == 0


def test_rows_of_a_trial_that_fails_are_not_cached(planted: Planted, make_runs: MakeRuns) -> None:
    """A later trial starts from what passed; what failed would only take its memory."""
    costs = []
    for limit in (1.0, -1.0):
        runs = make_runs(seeds=2, layers=list(DOWN_AND_MID))
        answers = Answers(runs)
        answers.find([Trial(0, NeuronSet({FIRST: [0]}))], limit=limit)
        before = runs.samples
        answers.find([Trial(0, NeuronSet({FIRST: [0], MID: [0]}))])
        costs.append(runs.samples - before)
    assert costs[0] < costs[1]
