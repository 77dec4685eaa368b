"""The tables of an evaluation in the report."""

from pathlib import Path

import pytest

from nemo_ext.errors import NemoError
from nemo_ext.report.tables import evaluation_tables

SUMMARY = """group,stage,measure,value,deviation,prompts
VM,before,SSCD_orig,0.8312,0.05,3
VM,after,SSCD_orig,0.09,0.01,3
TM,after,neurons,21,18,2
"""


def test_have_one_row_for_each_measure_and_one_column_for_each_stage(tmp_path: Path) -> None:
    (tmp_path / "evaluation-summary.csv").write_text(SUMMARY)
    verbatim, template = evaluation_tables(tmp_path)
    assert verbatim.title == "Evaluation: VM"
    assert list(verbatim.rows) == [("SSCD_orig", "0.831 ± 0.05", "0.09 ± 0.01", "–")]
    assert list(template.rows) == [("neurons", "–", "21 ± 18", "–")]


def test_are_absent_without_an_evaluation(tmp_path: Path) -> None:
    assert evaluation_tables(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    ["group,stage\nVM,before\n", SUMMARY.replace("0.8312", "high"), "group,measure,stage,value,deviation\nVM,SSCD\n"],
)
def test_of_another_file_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation-summary.csv").write_text(content)
    with pytest.raises(NemoError, match=r"evaluation-summary\.csv is not the summary of an evaluation"):
        evaluation_tables(tmp_path)
