"""The whole search on real pipelines: it finds what was planted, says what it can't, and leaves no trace."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import DOWN_AND_MID, Planted, planted_pipeline, tiny_pipeline

import nemo_ext
from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.measure.threshold import memorization_threshold
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patch
from nemo_ext.results.folder import ResultsFolder, read_results
from nemo_ext.results.record import Localization
from nemo_ext.search import grouped
from nemo_ext.search.localizer import Localizer, localize

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()
EVERYTHING = NeuronSet({layer: range(width) for layer, width in DOWN_AND_MID.items()})
FIRST, *_, MID = DOWN_AND_MID
SEEDS = 3


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def statistics(planted: Planted) -> ActivationStatistics:
    return collect_statistics(planted.pipe, planted.ordinary_prompts)


@pytest.fixture(scope="module")
def found(planted: Planted, statistics: ActivationStatistics) -> Localization:
    return localize(planted.pipe, planted.memorized_prompt, statistics=statistics, threshold=0.5, seeds=SEEDS)


@pytest.fixture
def localizer(planted: Planted, statistics: ActivationStatistics) -> Localizer:
    return Localizer(planted.pipe, statistics=statistics, threshold=0.5, seeds=SEEDS)


@pytest.fixture(scope="module")
def stubborn() -> Planted:
    """The carriers hold a constant whatever the prompt, so the pattern always comes and no neuron can stop it."""
    planted = planted_pipeline()
    with torch.no_grad():
        planted.pipe.unet.conv_in.bias[:4] = 1000
    return planted


@pytest.fixture(scope="module")
def stubborn_statistics(stubborn: Planted) -> ActivationStatistics:
    return collect_statistics(stubborn.pipe, stubborn.ordinary_prompts)


def but_for_time(found: Localization) -> Localization:
    return dataclasses.replace(found, seconds=0.0)


def state_of(pipe: StableDiffusionPipeline) -> list[object]:
    """All that a search could leave behind: classes, buffers, modes, gradients, scheduler, random numbers."""
    return [
        [(type(module), module.training, sorted(vars(module))) for module in pipe.unet.modules()],
        [(name, buffer.tolist()) for name, buffer in pipe.unet.named_buffers()],
        [(parameter.requires_grad, parameter.grad) for parameter in pipe.unet.parameters()],
        [module.training for module in pipe.text_encoder.modules()],
        dict(pipe.scheduler.config),
        pipe.scheduler.num_inference_steps,
        torch.get_rng_state().tolist(),
    ]


class TestPlantedNeurons:
    @pytest.mark.parametrize("protocol", [PAPER, PUBLISHED], ids=lambda protocol: protocol.name)
    def test_are_found_exactly(self, planted: Planted, statistics: ActivationStatistics, protocol: Protocol) -> None:
        found = localize(
            planted.pipe,
            planted.memorized_prompt,
            statistics=statistics,
            threshold=0.5,
            seeds=SEEDS,
            protocol=protocol,
        )
        assert found.memorized
        assert found.neurons == planted.neurons
        assert found.score_before > 0.9
        assert found.score_after < 0.3

    def test_and_their_decoys_are_selected_at_first(self, planted: Planted, found: Localization) -> None:
        assert len((planted.neurons | planted.decoys) - found.initial_neurons) == 0
        assert (found.theta, found.top_k) == (5.0, 0)

    def test_come_with_a_certificate(self, planted: Planted, found: Localization) -> None:
        certificate = found.certificate
        assert certificate is not None
        assert certificate.below_threshold
        assert certificate.minimal
        assert [(row.layer, row.index) for row in certificate.each_on] == list(planted.neurons.pairs())
        assert all(row.score > 0.9 for row in certificate.each_on)
        assert (certificate.score, certificate.threshold) == (found.score_after, found.threshold_used)

    def test_threshold_of_the_model_itself_does(self, planted: Planted, statistics: ActivationStatistics) -> None:
        threshold = memorization_threshold(planted.pipe, planted.ordinary_prompts[:4], seeds=SEEDS)
        found = localize(
            planted.pipe, planted.memorized_prompt, statistics=statistics, threshold=threshold, seeds=SEEDS
        )
        assert found.neurons == planted.neurons
        assert found.threshold == float(threshold)

    def test_only_chosen_layers_are_searched(self, planted: Planted, statistics: ActivationStatistics) -> None:
        """The planted neurons of the other layers keep the pattern: no τ below 1 can be reached."""
        found = localize(
            planted.pipe, planted.memorized_prompt, statistics=statistics, threshold=0.5, seeds=SEEDS, layers=[MID]
        )
        assert found.layers == (MID,)
        assert set(found.initial_neurons) <= {MID}
        assert found.floor > 0.9

    @pytest.mark.parametrize("batch_size", [1, 2, 10])
    def test_are_the_same_for_any_batch_size(
        self, planted: Planted, statistics: ActivationStatistics, found: Localization, batch_size: int
    ) -> None:
        other = localize(
            planted.pipe,
            planted.memorized_prompt,
            statistics=statistics,
            threshold=0.5,
            seeds=SEEDS,
            batch_size=batch_size,
        )
        assert other.neurons == found.neurons
        assert other.initial_neurons == found.initial_neurons
        # Trials ahead of their turn can be in vain.
        assert other.unet_samples == pytest.approx(found.unet_samples, rel=0.1)

    def test_are_the_same_on_every_run(self, localizer: Localizer, planted: Planted, found: Localization) -> None:
        torch.rand(3)
        assert but_for_time(localizer.localize(planted.memorized_prompt)) == but_for_time(found)


class TestUnmemorizedPrompt:
    def test_is_said_to_be_so_and_nothing_is_searched(self, localizer: Localizer, planted: Planted) -> None:
        found = localizer.localize(planted.ordinary_prompts[0])
        assert not found.memorized
        assert found.score_before < 0.5
        assert found.unet_samples == SEEDS
        assert len(found.neurons) == len(found.initial_neurons) == len(found.kept_seeds) == 0
        assert (found.score_after, found.floor, found.threshold_used) == (None, None, None)
        assert (found.theta, found.top_k, found.certificate) == (None, None, None)


class TestFloor:
    """The remaining memorization with all searched neurons off: the exhaustive search measures it before anything
    else, the grouped one only if the first candidates are not enough."""

    def test_above_the_threshold_is_said_with_both_numbers_and_raises_it(
        self, stubborn: Planted, stubborn_statistics: ActivationStatistics
    ) -> None:
        found = localize(
            stubborn.pipe, stubborn.memorized_prompt, statistics=stubborn_statistics, threshold=0.5, seeds=SEEDS
        )
        assert found.floor > 0.5
        assert found.threshold == 0.5
        assert found.threshold_used == pytest.approx(found.floor + 0.01)
        assert found.notes == (
            f"with all {len(EVERYTHING)} searched neurons off the similarity is still {found.floor:.3f}, "
            f"above τ = 0.500: searched with τ = {found.threshold_used:.3f}",
        )

    def test_above_the_threshold_wastes_no_trials(
        self, stubborn: Planted, stubborn_statistics: ActivationStatistics
    ) -> None:
        """The published code steps θ down to the end; here one evaluation tells."""
        counts = {}
        for protocol in (PAPER, dataclasses.replace(PAPER, measures_floor=False)):
            found = localize(
                stubborn.pipe,
                stubborn.ordinary_prompts[0],
                statistics=stubborn_statistics,
                threshold=0.5,
                seeds=SEEDS,
                search="exhaustive",
                protocol=protocol,
            )
            counts[protocol.measures_floor] = found.unet_samples
            assert found.memorized
        assert counts[True] <= SEEDS * 2  # the score, and all neurons off
        assert counts[False] > counts[True] + 8  # sixteen steps, of a seed each

    def test_below_the_threshold_costs_one_evaluation_and_changes_nothing(
        self, planted: Planted, statistics: ActivationStatistics
    ) -> None:
        measured, without = (
            localize(
                planted.pipe,
                planted.memorized_prompt,
                statistics=statistics,
                threshold=0.5,
                seeds=SEEDS,
                search="exhaustive",
                protocol=dataclasses.replace(PAPER, measures_floor=measures_floor),
            )
            for measures_floor in (True, False)
        )
        assert measured.floor is not None
        assert measured.floor < 0.3
        assert without.floor is None
        assert without.neurons == measured.neurons
        assert measured.unet_samples - SEEDS <= without.unet_samples < measured.unet_samples
        assert measured.notes == ()
        assert measured.threshold_used == measured.threshold

    def test_is_not_measured_where_the_first_candidates_are_enough(self, found: Localization) -> None:
        assert found.search == "grouped"
        assert found.theta == PAPER.first_theta
        assert found.floor is None


class TestThePipelineIsLeftAsItWas:
    def test_untouched(self, localizer: Localizer, planted: Planted) -> None:
        before = state_of(planted.pipe)
        localizer.localize(planted.memorized_prompt)
        assert state_of(planted.pipe) == before

    def test_patched_in_training_with_gradients(self, found: Localization) -> None:
        planted = planted_pipeline()
        pipe = planted.pipe
        statistics = collect_statistics(pipe, planted.ordinary_prompts)
        patch(pipe, planted.neurons, scale=0.5)
        pipe.unet.train()
        pipe.unet.mid_block.eval()
        for parameter in pipe.unet.mid_block.parameters():
            parameter.requires_grad_(False)
        before = state_of(pipe)
        again = localize(pipe, planted.memorized_prompt, statistics=statistics, threshold=0.5, seeds=SEEDS)
        assert state_of(pipe) == before
        assert again.neurons == found.neurons
        assert again.score_before == found.score_before

    def test_after_an_exception(self, localizer: Localizer, planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            assert is_patched(planted.pipe)
            raise KeyboardInterrupt

        before = state_of(planted.pipe)
        monkeypatch.setattr(grouped, "select_candidates", fail)
        with pytest.raises(KeyboardInterrupt):
            localizer.localize(planted.memorized_prompt)
        assert state_of(planted.pipe) == before


class TestRefusals:
    def test_search_that_does_not_exist(self, planted: Planted, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="search must be 'exhaustive' or 'grouped', got 'fast'"):
            Localizer(planted.pipe, statistics=statistics, threshold=0.5, search="fast")

    def test_statistics_of_another_model(self, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="statistics were collected from another model"):
            Localizer(tiny_pipeline(), statistics=statistics, threshold=0.5)

    def test_statistics_of_other_layers(self, planted: Planted) -> None:
        statistics = collect_statistics(planted.pipe, planted.ordinary_prompts, layers=[MID])
        with pytest.raises(NemoError, match=f"the statistics have no layer '{FIRST}'"):
            Localizer(planted.pipe, statistics=statistics, threshold=0.5, layers="down+mid")

    @pytest.mark.parametrize("threshold", [1.5, float("nan")])
    def test_threshold_that_is_no_similarity(
        self, planted: Planted, statistics: ActivationStatistics, threshold: float
    ) -> None:
        with pytest.raises(NemoError, match="threshold must be a similarity, from -1 to 1"):
            Localizer(planted.pipe, statistics=statistics, threshold=threshold)

    def test_threshold_measured_otherwise(self, planted: Planted, statistics: ActivationStatistics) -> None:
        threshold = memorization_threshold(planted.pipe, planted.ordinary_prompts[:2], seeds=2)
        with pytest.raises(NemoError, match="measured with seeds 2, got 3"):
            Localizer(planted.pipe, statistics=statistics, threshold=threshold, seeds=3)


class TestManyPrompts:
    def test_results_are_written_one_a_line(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, found: Localization
    ) -> None:
        prompts = [planted.ordinary_prompts[0], planted.memorized_prompt]
        results = localizer.localize_many(prompts, out=tmp_path / "new folder")
        assert [result.prompt for result in results] == prompts
        assert but_for_time(results[1]) == but_for_time(found)
        lines = (tmp_path / "new folder" / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == prompts
        assert json.loads(lines[1])["neurons"] == planted.neurons.to_dict()
        assert read_results(tmp_path / "new folder") == results
        assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["results.jsonl"]

    def test_what_is_there_is_not_searched_again(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second, third = planted.ordinary_prompts[:3]
        before = localizer.localize_many([first, second], out=tmp_path)
        searched = _note_searches(localizer, monkeypatch)
        after = localizer.localize_many([third, second, third], out=tmp_path)
        assert searched == [third]
        assert [found.prompt for found in after] == [third, second, third]
        assert after[1] == before[1]
        assert [found.prompt for found in read_results(tmp_path)] == [first, second, third]

    def test_an_interruption_keeps_what_was_done(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = planted.ordinary_prompts[:2]
        with monkeypatch.context() as patching:
            _note_searches(localizer, patching, fail_at=second)
            with pytest.raises(KeyboardInterrupt):
                localizer.localize_many([first, second], out=tmp_path)
        assert [found.prompt for found in read_results(tmp_path)] == [first]
        searched = _note_searches(localizer, monkeypatch)
        localizer.localize_many([first, second], out=tmp_path)
        assert searched == [second]

    def test_results_of_other_settings_are_refused(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, statistics: ActivationStatistics
    ) -> None:
        localizer.localize_many(planted.ordinary_prompts[:1], out=tmp_path)
        other = Localizer(planted.pipe, statistics=statistics, threshold=0.4, seeds=SEEDS)
        with pytest.raises(NemoError, match=r"results with another threshold: 0\.5, now 0\.4; choose another folder"):
            other.localize_many(planted.ordinary_prompts[:1], out=tmp_path)
        other.localize_many(planted.ordinary_prompts[:1], out=tmp_path, resume=False)
        assert [found.threshold for found in read_results(tmp_path)] == [0.4]

    def test_a_label_is_kept_with_the_result(self, tmp_path: Path, localizer: Localizer, planted: Planted) -> None:
        first, second = planted.ordinary_prompts[:2]
        results = localizer.localize_many([first, second], out=tmp_path, labels={second: "TM", "another": "VM"})
        assert [found.label for found in results] == [None, "TM"]
        assert read_results(tmp_path) == results
        assert localizer.localize_many([second], out=tmp_path) == results[1:]

    def test_each_result_costs_the_same_however_many_there_are(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each result is read once, and nothing of those that are there is written again."""
        found = localizer.localize(planted.ordinary_prompts[0])
        with ResultsFolder(tmp_path).writing() as writer:
            for place in range(5):
                writer.append(dataclasses.replace(found, prompt=f"old {place}"))
        before = (tmp_path / "results.jsonl").read_bytes()
        read = Counter[str]()

        def from_dict(values: dict[str, Any]) -> Localization:
            read[values["prompt"]] += 1
            return dataclasses.replace(found, prompt=values["prompt"])

        monkeypatch.setattr(Localization, "from_dict", from_dict)
        _note_searches(localizer, monkeypatch)
        localizer.localize_many(planted.ordinary_prompts[:3], out=tmp_path)
        new = planted.ordinary_prompts[:3]
        assert read == dict.fromkeys((*(f"old {place}" for place in range(5)), *new), 1)
        after = (tmp_path / "results.jsonl").read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == 8

    def test_batch_size_is_no_setting(
        self, tmp_path: Path, localizer: Localizer, planted: Planted, statistics: ActivationStatistics
    ) -> None:
        before = localizer.localize_many(planted.ordinary_prompts[:1], out=tmp_path)
        other = Localizer(planted.pipe, statistics=statistics, threshold=0.5, seeds=SEEDS, batch_size=1)
        assert other.localize_many(planted.ordinary_prompts[:1], out=tmp_path) == before

    def test_one_text_is_refused(self, localizer: Localizer) -> None:
        with pytest.raises(NemoError, match="prompts must be a sequence of texts, got one text"):
            localizer.localize_many("a zebra")


def _note_searches(localizer: Localizer, monkeypatch: pytest.MonkeyPatch, fail_at: str | None = None) -> list[str]:
    """The prompts that the localizer searches from now on; at `fail_at` somebody presses Ctrl+C."""
    searched: list[str] = []
    search = localizer._search

    def noted(prompt: str, bars: object) -> object:
        if prompt == fail_at:
            raise KeyboardInterrupt
        searched.append(prompt)
        return search(prompt, bars)

    monkeypatch.setattr(localizer, "_search", noted)
    return searched


class TestResults:
    def test_round_trip(self, found: Localization, localizer: Localizer, planted: Planted) -> None:
        for result in (found, localizer.localize(planted.ordinary_prompts[0])):
            assert Localization.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result

    def test_hold_all_that_they_depend_on(self, found: Localization, localizer: Localizer) -> None:
        assert found.settings == localizer.settings

    def test_of_a_folder_without_any_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"results\.jsonl does not exist"):
            read_results(tmp_path)

    @pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}'])
    def test_broken_line_is_named(self, tmp_path: Path, found: Localization, line: str) -> None:
        path = tmp_path / "results.jsonl"
        path.write_text(json.dumps(found.to_dict()) + "\n" + line + "\n")
        with pytest.raises(NemoError, match=r"results\.jsonl, line 2, is not a result"):
            read_results(path)


def test_progress_is_silent_off_a_terminal_and_named_on_demand(
    localizer: Localizer, planted: Planted, capfd: pytest.CaptureFixture[str]
) -> None:
    localizer.localize(planted.memorized_prompt)
    assert capfd.readouterr() == ("", "")
    localizer.localize(planted.memorized_prompt, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "certificate" in err


def test_public_names_are_all_there() -> None:
    for name in nemo_ext.__all__:
        assert hasattr(nemo_ext, name)
    assert set(nemo_ext.__all__) <= set(dir(nemo_ext))
    with pytest.raises(AttributeError, match="localise"):
        _ = nemo_ext.localise


def test_the_package_loads_torch_with_the_first_public_name_and_not_before() -> None:
    program = (
        "import sys, nemo_ext; before = 'torch' in sys.modules; nemo_ext.ops; print(before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
