"""Results in the columns of the published code, read back as its scripts do."""

import ast
import csv
import dataclasses
import re
from pathlib import Path

import pytest
from evaluation_parts import localization

from nemo_ext.neurons import NeuronSet
from nemo_ext.prompts import Prompt
from nemo_ext.results.published import initial_score, write_published_results
from nemo_ext.results.record import Localization

LAYERS = (*(f"down_blocks.{block}.attn{place}.to_v" for block in range(3) for place in range(2)), "mid.to_v")
INITIAL = NeuronSet({LAYERS[0]: [7], LAYERS[2]: [3, 1], LAYERS[6]: [30, 2]})
FOUND = NeuronSet({LAYERS[2]: [3], LAYERS[6]: [2]})


@pytest.fixture
def found() -> Localization:
    """The search tried one neuron, then five; of these five it needs two."""
    return dataclasses.replace(
        localization("a; fox", FOUND, "0"),
        layers=LAYERS,
        initial_neurons=INITIAL,
        theta=4.75,
        threshold_used=0.5,
        history=((99, 0.1), (1, 0.875), (5, 0.25), (3, 0.6), (2, 0.375)),
        score_after=0.375,
    )


def str_to_list(text: str) -> list[list[int]]:
    """How `4_generate_images.py` reads a column of neurons."""
    return [list(map(int, re.findall(r"\d+", part))) for part in re.findall(r"\[.*?\]", text)]


def written(path: Path, *results: tuple[Prompt, Localization]) -> list[dict[str, str]]:
    write_published_results(path, results)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def test_the_columns_are_the_published_ones(found: Localization, tmp_path: Path) -> None:
    (row,) = written(tmp_path / "r.csv", (Prompt("a; fox", "VM", "https://example.org/?a;b", 2), found))
    assert (tmp_path / "r.csv").read_text().splitlines()[0] == (
        "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
    )
    assert (row["Caption"], row["URL"]) == ("a; fox", "https://example.org/?a;b")
    assert ast.literal_eval(row["Initial Neurons"]) == [[7], [], [1, 3], [], [], [], [2, 30]]
    assert ast.literal_eval(row["Refined Neurons"]) == [[], [], [3], [], [], [], [2]]
    assert (float(row["Initial SSIM"]), float(row["Refined SSIM"])) == (0.25, 0.375)


def test_the_published_scripts_read_seven_lists(found: Localization, tmp_path: Path) -> None:
    (row,) = written(tmp_path / "r.csv", (Prompt("a", None, None, 1), found))
    assert str_to_list(row["Initial Neurons"]) == [[7], [], [1, 3], [], [], [], [2, 30]]


def test_a_prompt_that_is_not_memorized_has_empty_lists_and_zeros(found: Localization, tmp_path: Path) -> None:
    ordinary = dataclasses.replace(localization("b", NeuronSet(), "0", memorized=False), layers=LAYERS)
    rows = written(tmp_path / "r.csv", (Prompt("b", None, None, 1), ordinary), (Prompt("a; fox", None, None, 2), found))
    assert [row["Caption"] for row in rows] == ["b", "a; fox"]
    assert rows[0]["Initial Neurons"] == rows[0]["Refined Neurons"] == str([[]] * 7)
    assert (rows[0]["URL"], rows[0]["Initial SSIM"], rows[0]["Refined SSIM"]) == ("", "0", "0")


def test_a_set_that_images_found_has_no_initial_similarity(found: Localization, tmp_path: Path) -> None:
    by_images = dataclasses.replace(found, theta=None, top_k=None, initial_neurons=NeuronSet())
    assert initial_score(by_images) is None
    (row,) = written(tmp_path / "r.csv", (Prompt("a", None, None, 1), by_images))
    assert row["Initial SSIM"] == ""


def test_the_initial_similarity_is_the_first_one_that_the_search_accepted(found: Localization) -> None:
    history = ((5, 0.9), (5, 0.45), (5, 0.2))  # the first was above τ, and then τ was raised
    assert initial_score(dataclasses.replace(found, history=history)) == 0.45
