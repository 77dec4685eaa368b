"""The table of how well detectors of memorized prompts work."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from tiny_pipeline import planted_pipeline, tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.detection import DetectionTable, MeasuredDetector, detection_table, measure_detectors
from nemo_ext.evaluate.detector_runs import DetectorRuns
from nemo_ext.evaluate.detectors import DETECTORS, FIRST_MAGNITUDE, MEAN_MAGNITUDE, NEMO, Z_SCORE
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics

PROMPTS = ("a cat", "two dogs")
LABELS = (True, False)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def statistics(pipe: StableDiffusionPipeline) -> ActivationStatistics:
    return collect_statistics(pipe, ("one", "a red boat", "rain", "three birds"))


def measure(pipe: Any, prompts: Any = PROMPTS, labels: Any = LABELS, **options: Any) -> DetectionTable:
    given = {"statistics": None, "seeds": 2, "steps": 1, "batch_size": 2, **options}
    return measure_detectors(pipe, prompts, labels, **given)


@pytest.fixture(scope="module")
def table(pipe: StableDiffusionPipeline, statistics: ActivationStatistics) -> DetectionTable:
    return measure(pipe, statistics=statistics)


class TestMeasureDetectors:
    def test_has_the_scores_of_every_detector_for_every_prompt(
        self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics, table: DetectionTable
    ) -> None:
        runs = DetectorRuns(
            pipe, statistics=statistics, protocol=Protocol.paper(), seeds=2, steps=1, guidance=7.5, batch_size=2
        )
        found = [runs.scores(prompt) for prompt in PROMPTS]
        assert [row.measured.detector for row in table.rows] == list(DETECTORS)
        for row in table.rows:
            assert row.measured.scores == pytest.approx([scores[row.measured.detector] for scores in found])
            assert row.measured.unet_samples == runs.samples_alone()[row.measured.detector]

    def test_finds_the_planted_prompts(self) -> None:
        planted = planted_pipeline()
        prompts = (planted.memorized_prompt, "a lazy zoo", *planted.ordinary_prompts[:2])
        table = measure(planted.pipe, prompts, (True, True, False, False))
        for row in table.rows:
            if row.measured.detector in (NEMO, FIRST_MAGNITUDE, MEAN_MAGNITUDE):
                assert row.auroc is not None
                assert row.tpr_at_1_percent_fpr is not None
                assert row.auroc.value == row.tpr_at_1_percent_fpr.value == 1

    def test_says_how_it_was_measured(self, table: DetectionTable) -> None:
        settings = table.settings
        assert settings is not None
        assert (settings.protocol, settings.seeds, settings.steps) == (Protocol.paper(), 2, 1)
        assert settings.guidance == 7.5  # the pipeline's own
        # For each prompt: 1 early, 1 late and 1 of the generation; for all prompts: the empty prompt at these steps.
        assert settings.unet_samples == 2 * (2 * 3 + 3)

    def test_lists_a_detector_that_cannot_be_measured_with_the_reason(self, pipe: StableDiffusionPipeline) -> None:
        row = next(row for row in measure(pipe).rows if row.measured.detector == Z_SCORE)
        assert row.measured.scores is row.auroc is row.tpr_at_1_percent_fpr is None
        assert row.measured.reason == "it needs activation statistics: give the result of collect_statistics"

    def test_returns_the_same_table_each_time(
        self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics, table: DetectionTable
    ) -> None:
        assert measure(pipe, statistics=statistics) == table

    def test_refuses_statistics_of_another_model(self, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="statistics were collected from another model"):
            measure(tiny_pipeline(seed=1), statistics=statistics)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels": (True, False, False)}, "each prompt needs one label: got 2 prompts and 3 labels"),
            ({"labels": (True, True)}, "on both classes: got 2 memorized and 0 ordinary prompts"),
            ({"labels": ("yes", "no")}, "label 0 must be True or False, got 'yes'"),
            ({"steps": 0}, "steps must be 1 or more, got 0"),
            ({"seeds": 0}, "seeds must be 1 or more, got 0"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ],
    )
    def test_refuses_what_it_cannot_measure(
        self, pipe: StableDiffusionPipeline, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(NemoError, match=message):
            measure(pipe, **options)


class TestDetectionTable:
    def test_counts_the_prompts_of_each_class(self) -> None:
        table = detection_table([], [True] * 3 + [False] * 205)
        assert (table.memorized, table.ordinary, table.false_positives_allowed) == (3, 205, 2)

    def test_follows_the_direction_of_a_detector(self) -> None:
        labels, numbers = (True, True, False, False), (1.0, 2.0, 3.0, 4.0)
        lower = replace(NEMO, higher_is_memorized=False)
        up, down = detection_table(
            [MeasuredDetector(detector, 1, numbers) for detector in (NEMO, lower)], labels, resamples=10
        ).rows
        assert up.auroc is not None
        assert down.auroc is not None
        assert (up.auroc.value, down.auroc.value) == (0, 1)

    def test_uses_the_same_resamples_for_all_detectors(self) -> None:
        numbers = tuple(float(7 * n % 20) for n in range(20))
        labels = [n % 3 == 0 for n in range(20)]
        one, two = detection_table([MeasuredDetector(d, 1, numbers) for d in (NEMO, Z_SCORE)], labels).rows
        assert (one.auroc, one.tpr_at_1_percent_fpr) == (two.auroc, two.tpr_at_1_percent_fpr)

    def test_refuses_scores_that_do_not_fit(self) -> None:
        with pytest.raises(NemoError, match="nemo has 3 scores for 2 labels: give one for each"):
            detection_table([MeasuredDetector(NEMO, 1, (1.0, 2.0, 3.0))], (True, False))
        with pytest.raises(NemoError, match="a score of nemo is NaN"):
            detection_table([MeasuredDetector(NEMO, 1, (1.0, math.nan))], (True, False))
        with pytest.raises(NemoError, match="resamples must be 1 or more, got 0"):
            detection_table([MeasuredDetector(NEMO, 1, (1.0, 2.0))], (True, False), resamples=0)

    def test_becomes_json(self, table: DetectionTable) -> None:
        values = json.loads(json.dumps(table.to_dict(), allow_nan=False))
        assert [row["name"] for row in values["detectors"]] == [detector.name for detector in DETECTORS]
        assert values["detectors"][0]["scores"] == list(table.rows[0].measured.scores or ())
        assert (values["memorized"], values["ordinary"], values["false_positives_allowed"]) == (1, 1, 0)
        assert values["settings"]["protocol"]["name"] == "paper"

    def test_has_no_infinity_in_json(self) -> None:
        table = detection_table([MeasuredDetector(Z_SCORE, 0, (math.inf, 2.0))], (True, False))
        assert table.to_dict()["detectors"][0]["scores"] == [None, 2.0]
