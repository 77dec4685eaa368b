"""Runs: which trials share a call, where calls enter the denoiser, what they give and what they cost."""

import random
from collections.abc import Callable

import pytest
import torch
from planted_runs import find_entry_points
from tiny_pipeline import DOWN_AND_MID, Planted, tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure import memory
from nemo_ext.measure.noise import noise_differences
from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.text import encode_prompts
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import PatchHandle, patch_handle, patched
from nemo_ext.search import runs as runs_module
from nemo_ext.search.runs import Runs, Trial

MakeRuns = Callable[..., Runs]
LAYERS = list(DOWN_AND_MID)
FIRST, *_, MID = LAYERS
PAPER = Protocol.paper()


def is_unscaled(handle: PatchHandle) -> bool:
    return all(bool((handle.patched_layer(layer).neuron_scale == 1).all()) for layer in handle.layers)


class TestDifferences:
    def test_are_those_of_a_pipeline_with_these_neurons_off(self, planted: Planted, make_runs: MakeRuns) -> None:
        runs = make_runs()
        trials = [Trial(0, NeuronSet({MID: [31], FIRST: [7]})), Trial(2, planted.neurons), Trial(1, NeuronSet())]
        text = encode_prompts(planted.pipe, [planted.memorized_prompt])
        for run, trial in zip(runs.of(trials), trials, strict=True):
            assert run.trial == trial
            with patched(planted.pipe, trial.neurons):
                expected = noise_differences(planted.pipe, text, runs.latents[[trial.seed]], PAPER)
            torch.testing.assert_close(run.difference, expected, rtol=1e-4, atol=1e-4)

    def test_no_neuron_is_off_afterwards_also_after_an_exception(
        self, planted: Planted, handle: PatchHandle, make_runs: MakeRuns
    ) -> None:
        runs = make_runs()
        runs.of([Trial(0, planted.neurons)])
        assert is_unscaled(handle)
        with pytest.raises(NemoError, match="no value layer 'up'"):
            runs.of([Trial(0, NeuronSet({"up": [0]}))])
        runs.latents[0] = float("nan")
        with pytest.raises(NemoError, match="not finite"):
            runs.of([Trial(0, planted.neurons)])
        assert is_unscaled(handle)

    @pytest.mark.parametrize("layers", [None, LAYERS])
    def test_are_computed_in_the_order_in_which_they_are_wanted(
        self, layers: list[str] | None, make_runs: MakeRuns
    ) -> None:
        """Trials of one entry point stay together, those that are named first come first."""
        runs = make_runs(layers=layers)
        runs.untouched()
        trials = [Trial(0, NeuronSet({MID: [0]})), Trial(1, NeuronSet({FIRST: [0]})), Trial(2, NeuronSet({MID: [1]}))]
        order = [0, 1, 2] if layers is None else [0, 2, 1]
        assert [run.trial for run in runs.of(trials)] == [trials[place] for place in order]


class TestCost:
    def test_counts_every_latent(self, planted: Planted, make_runs: MakeRuns) -> None:
        runs = make_runs(seeds=3)
        assert runs.samples == 0
        assert runs.untouched().shape[0] == 3
        assert runs.samples == 3
        assert runs.untouched() is runs.untouched()
        runs.of([Trial(0, planted.neurons), Trial(1, planted.neurons)])
        assert runs.samples == 5

    def test_a_trial_ahead_joins_only_where_a_batch_has_room(self, make_runs: MakeRuns) -> None:
        runs = make_runs(seeds=3, batch_size=2)
        ahead = [Trial(0, NeuronSet({MID: [place]})) for place in (1, 2)]
        assert [run.trial for run in runs.of([Trial(seed, NeuronSet({MID: [0]})) for seed in range(3)], ahead)] == [
            *(Trial(seed, NeuronSet({MID: [0]})) for seed in range(3)),
            ahead[0],
        ]
        assert runs.samples == 4

    def test_a_trial_ahead_joins_only_where_it_can_enter_the_denoiser(self, make_runs: MakeRuns) -> None:
        """What is wanted enters at the last layer; a set of the first one has to begin before that."""
        runs = make_runs(seeds=2, layers=LAYERS)
        runs.untouched()
        for place, ahead, rows in ((0, FIRST, 1), (1, MID, 2)):
            found = runs.of([Trial(0, NeuronSet({MID: [place]}))], [Trial(0, NeuronSet({ahead: [8]}))])
            assert len(found) == rows

    def test_entering_late_changes_nothing_but_the_cost(self, make_runs: MakeRuns) -> None:
        rng = random.Random(0)
        whole, late = make_runs(seeds=2), make_runs(seeds=2, layers=LAYERS)
        assert torch.equal(late.untouched(), whole.untouched())
        for _ in range(12):
            neurons = NeuronSet({layer: [rng.randrange(16)] for layer in rng.sample(LAYERS, 2)})
            trials = [Trial(seed, neurons) for seed in range(2)]
            found, expected = late.of(trials), whole.of(trials)
            for run, other in zip(found, expected, strict=True):
                torch.testing.assert_close(run.difference, other.difference, rtol=1e-4, atol=1e-4)
                late.keep(run)
        assert late.samples < 0.9 * whole.samples

    def test_neurons_of_layers_without_an_entry_are_not_taken_for_none(
        self, planted: Planted, make_runs: MakeRuns
    ) -> None:
        """The search's only layer is the last one; a neuron before it changes what comes in there."""
        late, whole = make_runs(seeds=2, layers=[MID]), make_runs(seeds=2)
        for runs in (late, whole):
            runs.untouched()
        found, expected = (runs.of([Trial(0, planted.neurons)])[0].difference for runs in (late, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("sets", [0, 2])
    def test_memory_for_cached_rows_changes_the_cost_alone(
        self, planted: Planted, sets: int, make_runs: MakeRuns, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry_points = find_entry_points(planted, LAYERS)
        monkeypatch.setattr(runs_module, "CACHE_BYTES", sets * 2 * entry_points.row_bytes)
        runs, expected = make_runs(seeds=2, layers=LAYERS), make_runs(seeds=2)
        for each in (runs, expected):
            each.untouched()
        for index in (0, 30, 31):
            trial = [Trial(1, NeuronSet({MID: [index]}))]
            torch.testing.assert_close(
                runs.of(trial)[0].difference, expected.of(trial)[0].difference, rtol=1e-4, atol=1e-4
            )
        assert (runs.samples == expected.samples) == (sets == 0)

    def test_the_batch_is_what_memory_allows_and_at_most_a_latent_for_each_seed(
        self, make_runs: MakeRuns, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for fitting, batch_size in ((1, 1), (2, 2), (100, 3)):
            monkeypatch.setattr(runs_module, "fitting_batch_size", lambda pipe, text, fitting=fitting: fitting)
            assert make_runs(seeds=3).batch_size == batch_size
        assert make_runs(seeds=3, batch_size=2).batch_size == 2

    def test_too_small_latents_are_refused_before_the_denoiser_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(sample_size=8)
        text = encode_prompts(pipe, ["a"])
        monkeypatch.setattr(memory, "evaluate_zeros", lambda *_, **__: pytest.fail("the denoiser ran"))
        with patch_handle(pipe) as handle, pytest.raises(NemoError, match="latents of 8x8 are smaller"):
            Runs(pipe, handle, text, seeds=3, protocol=PAPER)
