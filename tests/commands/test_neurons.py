"""`nemo-ext neurons`: combining and comparing the neurons of several prompts."""

import csv
import json
from pathlib import Path

import pytest
from evaluation_parts import localization
from tiny_pipeline import DOWN_AND_MID

from nemo_ext.cli import main
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder

ONE, TWO = list(DOWN_AND_MID)[:2]
SETS = {
    "a <b>zebra</b>": NeuronSet({ONE: [1, 2], TWO: [3]}),
    "a fox": NeuronSet({ONE: [2], TWO: [3]}),
    "an owl": NeuronSet({ONE: [7]}),
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    with ResultsFolder(tmp_path / "results").writing() as writer:
        for prompt, neurons in SETS.items():
            writer.append(localization(prompt, neurons, "model"))
        writer.append(localization("ordinary", NeuronSet(), "model", memorized=False))
    return tmp_path / "results"


def test_a_union_is_a_file_that_other_commands_take(tmp_path: Path, results: Path) -> None:
    out = tmp_path / "union.safetensors"
    assert main(["neurons", "union", "--neurons", str(results), "--out", str(out)]) == 0
    assert NeuronSet.load(out) == NeuronSet.union(SETS.values())


def test_a_union_of_the_most_frequent_neurons(tmp_path: Path, results: Path) -> None:
    out = tmp_path / "top.json"
    assert main(["neurons", "union", "--neurons", str(results), "--top", "2", "--out", str(out)]) == 0
    assert NeuronSet.load(out) == NeuronSet({ONE: [2], TWO: [3]})


def test_an_intersection_of_results_and_a_file(tmp_path: Path, results: Path) -> None:
    NeuronSet({ONE: [2, 7]}).save(tmp_path / "mine.json")
    (results / "results.jsonl").write_bytes(
        b"\n".join((results / "results.jsonl").read_bytes().splitlines()[:2]) + b"\n"
    )
    out = tmp_path / "both.json"
    mine = str(tmp_path / "mine.json")
    assert main(["neurons", "intersection", "--neurons", str(results), mine, "--out", str(out)]) == 0
    assert NeuronSet.load(out) == NeuronSet({ONE: [2]})


def test_frequencies_as_csv(tmp_path: Path, results: Path) -> None:
    out = tmp_path / "frequency.csv"
    assert main(["neurons", "frequency", "--neurons", str(results), "--top", "2", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"layer": ONE, "neuron": "2", "prompts": "2", "share": "0.6667"},
        {"layer": TWO, "neuron": "3", "prompts": "2", "share": "0.6667"},
    ]


def test_overlaps_as_json_the_largest_first(tmp_path: Path, results: Path) -> None:
    out = tmp_path / "overlap.json"
    assert main(["neurons", "overlap", "--neurons", str(results), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert rows[0] == {"prompt": "a <b>zebra</b>", "other": "a fox", "overlap": 0.6667}
    assert len(rows) == 3
    assert {row["overlap"] for row in rows[1:]} == {0.0}


def test_clusters_are_printed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neurons", "clusters", "--neurons", str(results)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "1", "2"]
    assert "a <b>zebra</b>" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("intersection", "--top", "2"), "--top is for union and frequency, not for intersection"),
        (("union", "--at-least", "0.5"), "--at-least is for clusters, not for union"),
        (("union", "--out", "table.csv"), "table.csv should end in .json or .safetensors"),
        (("overlap", "--out", "set.safetensors"), "set.safetensors should end in .csv or .json"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["neurons", *arguments, "--neurons", str(results)]) == 1
    assert said in capsys.readouterr().err
