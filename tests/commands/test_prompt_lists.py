"""Lists of prompts on the command line: their formats, parts of them, and the files of the published scripts."""

import argparse
import csv
from pathlib import Path

import pytest
import torch
from tiny_pipeline import DOWN_AND_MID, Planted

from nemo_ext.cli import main
from nemo_ext.commands.shared import add_prompt_list, read_captions, read_prompt_selection
from nemo_ext.errors import NemoError
from nemo_ext.results.folder import read_results
from nemo_ext.results.published import initial_score


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """Ten prompts, which are the numbers from 0 to 9."""
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(map(str, range(10))))
    return path


def arguments(path: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_prompt_list(parser, "prompts")
    return parser.parse_args(["--prompts", str(path), *options])


def chosen(path: Path, *options: str) -> str:
    return "".join(prompt.text for prompt in read_prompt_selection(arguments(path, *options)))


class TestParts:
    @pytest.mark.parametrize(("limit", "wanted"), [("3", "012"), ("10", "0123456789"), ("99", "0123456789")])
    def test_the_limit_takes_the_first_ones(self, numbers: Path, limit: str, wanted: str) -> None:
        assert chosen(numbers, "--limit", limit) == wanted

    @pytest.mark.parametrize("parts", [1, 2, 3, 10])
    def test_the_shards_share_all_prompts_evenly(self, numbers: Path, parts: int) -> None:
        shards = [chosen(numbers, "--shard", f"{part}/{parts}") for part in range(1, parts + 1)]
        assert sorted("".join(shards)) == list("0123456789")
        assert max(map(len, shards)) - min(map(len, shards)) <= 1

    def test_a_shard_is_a_part_of_the_limited_list(self, numbers: Path) -> None:
        assert chosen(numbers, "--limit", "5", "--shard", "2/2") == "13"

    def test_a_shard_without_prompts_is_refused(self, numbers: Path) -> None:
        with pytest.raises(NemoError, match=r"--shard 4/4 has no prompt, because there are 3 in all"):
            chosen(numbers, "--limit", "3", "--shard", "4/4")

    @pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1.5/2"])
    def test_what_is_no_part_is_wrong_usage(self, numbers: Path, shard: str) -> None:
        with pytest.raises(argparse.ArgumentError, match="isn't a part such as 1/4"):
            arguments(numbers, f"--shard={shard}")

    def test_a_deviation_needs_two_chosen_captions(self, numbers: Path) -> None:
        assert read_captions(arguments(numbers, "--limit", "2")) == ["0", "1"]
        with pytest.raises(NemoError, match=r"two captions or more, .*numbers\.txt gives one"):
            read_captions(arguments(numbers, "--limit", "1"))

    def test_a_single_prompt_has_no_parts(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        single = ["localize", "--model", "m", "--prompt", "p", "--statistics", "s", "--threshold", ".5"]
        assert main([*single, "--out", str(tmp_path / "r"), "--shard", "1/2"]) == 1
        assert "--limit and --shard choose prompts from a list" in capsys.readouterr().err


@pytest.mark.slow
def test_the_published_files_go_in_and_come_out(
    planted: Planted, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way with the published list of prompts, statistics file and result columns, in two shards."""
    captions = tmp_path / "laion.csv"
    captions.write_text("caption,url\n" + "".join(f'"{prompt}",u\n' for prompt in planted.ordinary_prompts))
    statistics = tmp_path / "statistics_v1_4.pt"
    assert main(["stats", "--model", str(model), "--prompts", str(captions), "--out", str(statistics)]) == 0
    assert [len(vectors) for vectors in torch.load(statistics, weights_only=True)] == [7, 7]

    suspects = tmp_path / "memorized.csv"
    ordinary, memorized = planted.ordinary_prompts[0], planted.memorized_prompt
    suspects.write_text(f";Caption;URL;type;Index\n0;{ordinary};https://a;TM;7\n1;{memorized};https://b;VM;8\n")
    search = ["localize", "--model", str(model), "--prompts", str(suspects), "--statistics", str(statistics)]
    search += ["--threshold", "0.5", "--seeds", "3", "--no-verify", "--out", str(tmp_path / "results")]
    capsys.readouterr()
    assert main([*search, "--shard", "1/2"]) == 0
    assert "TM" in capsys.readouterr().out
    assert [found.label for found in read_results(tmp_path / "results")] == ["TM"]

    table = tmp_path / "memorization_statistics_v1_4.csv"
    assert main([*search, "--published", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "The published statistics do not name their model." in printed
    assert "VM" in printed
    found = read_results(tmp_path / "results")[1]
    assert (found.label, found.neurons) == ("VM", planted.neurons)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    assert [(row["Caption"], row["URL"]) for row in rows] == [(ordinary, "https://a"), (memorized, "https://b")]
    lists = [list(found.neurons.get(layer, ())) for layer in DOWN_AND_MID]
    assert rows[1]["Refined Neurons"] == str(lists)
    assert rows[0]["Refined Neurons"] == str([[]] * 7)
    assert float(rows[1]["Initial SSIM"]) == initial_score(found) <= 0.5
    assert float(rows[1]["Refined SSIM"]) == found.score_after
