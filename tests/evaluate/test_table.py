"""The tables of an evaluation: medians over prompts, groups, and files."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_ext.evaluate.reference import REFERENCES
from nemo_ext.evaluate.replication import WithOriginals
from nemo_ext.evaluate.table import (
    STAGES,
    Evaluation,
    PromptEvaluation,
    StageMeasures,
    SummaryRow,
    measures,
    median_and_deviation,
)
from nemo_ext.measure.originals import LABELS


def stage(neurons: int, *similarity: float, diversity: float = 0.5) -> StageMeasures:
    instead = ("another prompt", *(None for _ in similarity[1:]))
    return StageMeasures(
        neurons=neurons,
        seed_similarity=diversity,
        originals=WithOriginals(similarity, instead, similarity, tuple(range(len(similarity)))),
        same_seed=similarity if neurons else None,
    )


def prompt(index: int, label: str | None, neurons: int, after: tuple[float, ...]) -> PromptEvaluation:
    return PromptEvaluation(
        index=index,
        prompt=f"=prompt, {index} [red]",
        label=label,
        verified=None,
        before=stage(0, 0.9, 0.8, 0.7, diversity=0.9),
        after=stage(neurons, *after),
        controls=(stage(neurons, 0.8, 0.8, 0.8), stage(neurons, 0.6, 0.6, 0.6), stage(neurons, 0.1, 0.1, 0.1)),
    )


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        prompts=(
            prompt(0, "VM", 1, (0.1, 0.2, 0.6)),
            prompt(1, "VM", 4, (0.3, 0.1, 0.2)),
            prompt(3, "TM", 9, (0.75, 0.8, 0.2)),
            prompt(4, None, 2, (0.0, 0.0, 0.05)),
        ),
        not_memorized=1,
        ordinary=None,
        similarity="SSCD (a file)",
        short_similarity="SSCD",
        model="0" * 64,
        seeds=(1, 2, 3),
        steps=50,
        guidance=7.0,
        scheduler="DDIMScheduler",
        draws=3,
        omitted={"CLIP alignment": "there is no CLIP"},
        seconds=1.0,
        reused_images=0,
    )


def row(evaluation: Evaluation, group: str, stage: str, measure: str) -> SummaryRow:
    (found,) = [one for one in evaluation.summary() if (one.group, one.stage, one.measure) == (group, stage, measure)]
    return found


def test_a_summary_has_medians_over_prompts_of_medians_over_seeds(evaluation: Evaluation) -> None:
    found = row(evaluation, "all", "after", "SSCD_orig")
    values = np.array([0.2, 0.2, 0.75, 0.0])
    assert found.value == pytest.approx(np.median(values))
    assert found.deviation == pytest.approx(np.median(np.abs(values - np.median(values))))
    assert found.prompts == 4


def test_a_group_has_the_prompts_of_its_label(evaluation: Evaluation) -> None:
    assert evaluation.groups == ("all", "VM", "TM")
    assert row(evaluation, "VM", "after", "neurons off").value == 2.5
    assert row(evaluation, "TM", "after", "neurons off").value == 9


def test_shares_of_copies_are_averaged_over_all_images(evaluation: Evaluation) -> None:
    found = row(evaluation, "all", "after", "share of SSCD_orig > 0.5")
    assert (found.value, found.deviation) == (pytest.approx(3 / 12), None)
    assert row(evaluation, "all", "after", "share of SSCD_orig > 0.7").value == pytest.approx(2 / 12)
    assert row(evaluation, "all", "after", "share with other original").value == pytest.approx(1 / 3)


def test_the_control_is_the_median_over_its_draws(evaluation: Evaluation) -> None:
    assert row(evaluation, "all", "control", "SSCD_orig").value == 0.6


def test_a_measure_without_values_has_no_column(evaluation: Evaluation) -> None:
    names = [measure.name for measure in evaluation.measures]
    assert "SSCD_gen" in names
    assert "CLIP alignment" not in names


def test_columns_are_named_after_the_similarity(evaluation: Evaluation) -> None:
    names = [measure.name for measure in replace(evaluation, short_similarity="pixels").measures]
    assert "pixels_orig" in names
    assert not any("SSCD" in name for name in names)


def test_a_note_names_the_training_image_that_appears_instead(evaluation: Evaluation) -> None:
    first, *others = evaluation.notes()
    assert first == "'=prompt, 0 [red]': 1 of 3 images after show the training image of 'another prompt'."
    assert len(others) == 3


def test_median_and_deviation_of_one_value() -> None:
    assert median_and_deviation([3.0]) == (3.0, 0)


class TestFiles:
    def test_the_json_has_everything(self, evaluation: Evaluation, tmp_path: Path) -> None:
        file, _, _ = evaluation.with_detection({"detectors": []}).save(tmp_path)
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["prompts"][1]["controls"][2]["originals"]["similarity"] == [0.1, 0.1, 0.1]
        assert content["omitted"] == {"CLIP alignment": "there is no CLIP"}
        assert content["detection"] == {"detectors": []}
        assert len(content["summary"]) == len(evaluation.summary())

    def test_the_table_has_a_row_for_each_prompt_and_stage(self, evaluation: Evaluation, tmp_path: Path) -> None:
        _, file, _ = evaluation.save(tmp_path)
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert [one["stage"] for one in rows] == list(STAGES) * 4
        assert rows[4]["prompt"] == "=prompt, 1 [red]"
        assert (rows[4]["label"], rows[10]["label"]) == ("VM", "")
        assert float(rows[4]["SSCD_orig"]) == 0.2

    def test_the_summary_file_has_the_summary(self, evaluation: Evaluation, tmp_path: Path) -> None:
        _, _, file = evaluation.save(tmp_path)
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert len(rows) == len(evaluation.summary())
        wanted = row(evaluation, "VM", "before", "SSCD between seeds")
        found = next(one for one in rows if (one["group"], one["measure"]) == ("VM", "SSCD between seeds"))
        assert float(found["value"]) == wanted.value == 0.9

    def test_values_that_are_not_finite_leave_the_files_as_they_were(
        self, evaluation: Evaluation, tmp_path: Path
    ) -> None:
        evaluation.save(tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="not JSON compliant"):
            replace(evaluation, seconds=float("nan"), steps=3).save(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_references_name_groups_measures_and_stages_that_exist() -> None:
    names = {measure.name for measure in measures("SSCD")}
    for reference in REFERENCES.values():
        assert "arXiv" in reference.source
        for group, measure, at in reference.values:
            assert group in LABELS
            assert measure in names
            assert at in STAGES


def test_the_paper_says_how_many_neurons_its_prompts_need() -> None:
    value = REFERENCES["paper"].value("VM", "neurons off", "after")
    assert value is not None
    assert (value.value, value.deviation) == (4, 3)
    assert REFERENCES["paper"].value("all", "neurons off", "after") is None
