"""`nemo-ext evaluate` as a user runs it, on a pipeline with planted neurons."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from evaluation_parts import localization, noise_image
from tiny_pipeline import Planted
from torch import Tensor, nn

from nemo_ext.cli import main
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FILES = {"evaluation.json", "evaluation.csv", "evaluation-summary.csv"}


class Rows(nn.Module):
    """A stand-in for SSCD, which compares the rows of images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(288, 512, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 3)) @ self.weight


@pytest.fixture(scope="module")
def sscd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sscd") / "sscd.pt"
    torch.jit.script(Rows()).save(str(path))
    return path


@pytest.fixture
def results(planted: Planted, tmp_path: Path) -> Path:
    """A results folder with a memorized prompt and another one, as `nemo-ext localize` writes it."""
    folder = ResultsFolder(tmp_path / "results")
    fingerprint = model_fingerprint(planted.pipe)
    with folder.writing() as writer:
        writer.append(localization(planted.memorized_prompt, planted.neurons, fingerprint))
        writer.append(localization("one dog", NeuronSet(), fingerprint, memorized=False))
    return folder.path


@pytest.fixture
def originals(planted: Planted, tmp_path: Path) -> Path:
    noise_image(1).save(tmp_path / "original.png")
    path = tmp_path / "originals.csv"
    path.write_text(f"prompt,image,label\n{planted.memorized_prompt},original.png,VM\n")
    return path


@pytest.fixture
def ordinary(planted: Planted, tmp_path: Path) -> Path:
    path = tmp_path / "ordinary.txt"
    path.write_text("\n".join(planted.ordinary_prompts[:3]))
    return path


def evaluate(model: Path, results: Path, *arguments: object) -> int:
    fast = ("--seeds", 2, "--steps", 1, "--guidance", 1, "--draws", 1)
    return main([*map(str, ("evaluate", "--model", model, "--results", results, *fast, *arguments))])


def test_the_tables_are_printed_and_written(
    model: Path,
    results: Path,
    originals: Path,
    ordinary: Path,
    sscd: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("--originals", originals, "--sscd", sscd, "--ordinary", ordinary, "--reference", "paper")
    code = evaluate(model, results, *arguments)
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    for part in (
        *("SSCD_orig", "SSCD_gen", "VM, verbatim prompts (1)", "3 ordinary prompts", "NeMo's score", "AUROC"),
        *("4±3", "0.83→0.09", "arXiv 2406.02366", "were not evaluated: 1.", "SSCD (sscd.pt"),
    ):
        assert part in printed.out, part
    tables, _, _ = printed.out.partition("The paper's values")
    assert max(map(len, tables.splitlines())) <= 80
    assert {file.name for file in results.iterdir()} == {"results.jsonl", "images", "evaluation", *FILES}
    content = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    assert content["detection"]["memorized"] == 1
    assert content["ordinary"]["prompts"] == 3
    with (results / "evaluation.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["stage"] for row in rows] == ["before", "after", "control"]
    assert [row["neurons off"] for row in rows] == ["0", "4", "4"]


def test_without_files_the_columns_are_left_out_with_their_reasons(
    model: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A substitute for SSCD needs no file. Its columns must not have SSCD's name.
    assert evaluate(model, results) == 0
    printed = capsys.readouterr().out
    for reason in (
        "SSCD: there is no SSCD without its model file; pixels takes its place.",
        "pixels_orig: nothing is compared with training images, because none were given.",
        "CLIP alignment: there is no alignment without",
        "FID: there is no distance of ordinary images without ordinary prompts.",
    ):
        assert reason in printed
    assert "pixels_gen" in printed
    assert "SSCD_gen" not in printed


def test_labels_of_the_list_of_prompts_group_the_figures(
    planted: Planted, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = localization(planted.memorized_prompt, planted.neurons, model_fingerprint(planted.pipe))
    with ResultsFolder(tmp_path).writing() as writer:
        writer.append(dataclasses.replace(found, label="photo"))
    assert evaluate(model, tmp_path) == 0
    assert "photo, labelled prompts (1)" in capsys.readouterr().out


def test_images_of_an_earlier_run_are_used_again(
    model: Path, results: Path, sscd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(model, results, "--sscd", sscd)
    first = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    evaluate(model, results, "--sscd", sscd)
    assert "6 images of an earlier run" in capsys.readouterr().out
    second = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    assert second["prompts"] == first["prompts"]


def test_markup_in_a_prompt_is_printed_as_it_is(
    planted: Planted, model: Path, sscd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ResultsFolder(tmp_path / "other")
    with folder.writing() as writer:
        writer.append(localization("[red]z[/]", planted.neurons, model_fingerprint(planted.pipe)))
    assert evaluate(model, folder.path, "--sscd", sscd) == 0
    assert "[red]z[/]" in capsys.readouterr().out


def test_one_set_for_all_prompts_is_measured_in_a_folder_of_its_own(
    planted: Planted, model: Path, results: Path, tmp_path: Path
) -> None:
    one = NeuronSet({layer: indices[:1] for layer, indices in planted.neurons.items()})
    one.save(tmp_path / "one.json")
    before = sorted(results.rglob("*"))
    assert evaluate(model, results, "--neurons", tmp_path / "one.json", "--out", tmp_path / "of-one") == 0
    assert sorted(results.rglob("*")) == before
    found = json.loads((tmp_path / "of-one" / "evaluation.json").read_text())
    (prompt,) = found["prompts"]
    assert prompt["after"]["neurons"] == len(one)
    assert prompt["verified"] is None


class TestBadInput:
    """Exit code 1, one sentence on stderr, and nothing written."""

    def refuses(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, *arguments: object, said: str
    ) -> None:
        before = sorted(results.rglob("*"))
        assert evaluate(model, results, *arguments) == 1
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1, errors
        assert errors.startswith("nemo-ext evaluate: ")
        assert said in errors
        assert sorted(results.rglob("*")) == before

    def test_a_folder_without_results(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        self.refuses(capsys, model, tmp_path, said="nemo-ext localize")

    def test_a_file_in_the_place_of_the_folder(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path
    ) -> None:
        self.refuses(capsys, model, results / "results.jsonl", said="is a file: give the folder")

    def test_an_sscd_file_that_is_none(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, originals: Path
    ) -> None:
        self.refuses(capsys, model, results, "--sscd", originals, said="is not a TorchScript file")

    def test_originals_that_do_not_match(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, originals: Path
    ) -> None:
        originals.write_text("prompt,image\nsomething else,original.png\n")
        self.refuses(capsys, model, results, "--originals", originals, said="none of the 1 prompts with originals")

    def test_originals_with_a_mistake(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, originals: Path
    ) -> None:
        originals.write_text("prompt,image\na,none.png\n")
        self.refuses(capsys, model, results, "--originals", originals, said="originals.csv, line 2: the image")

    def test_results_of_another_model(
        self, capsys: pytest.CaptureFixture[str], planted: Planted, model: Path, sscd: Path, tmp_path: Path
    ) -> None:
        folder = ResultsFolder(tmp_path / "other")
        with folder.writing() as writer:
            writer.append(localization("z", planted.neurons, "0" * 64))
        self.refuses(capsys, model, folder.path, "--sscd", sscd, said="the results belong to another model")

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--clip", "is not a CLIP model"),
            ("--sscd", "does not exist: it is sscd_disc_mixup"),
            ("--statistics", "there is no file"),
            ("--ordinary", "doesn't exist"),
        ],
    )
    def test_a_missing_file(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, tmp_path: Path, option: str, said: str
    ) -> None:
        self.refuses(capsys, model, results, option, tmp_path / "none", said=said)

    def test_one_set_without_a_folder_of_its_own(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, tmp_path: Path
    ) -> None:
        self.refuses(capsys, model, results, "--neurons", tmp_path / "one.json", said="--neurons needs --out DIR")

    def test_a_missing_inception_file(
        self, capsys: pytest.CaptureFixture[str], model: Path, results: Path, ordinary: Path, sscd: Path
    ) -> None:
        arguments = ("--sscd", sscd, "--ordinary", ordinary, "--inception", "none.pt")
        self.refuses(capsys, model, results, *arguments, said="the Inception file none.pt does not exist")


@pytest.mark.parametrize("option", ["--seeds=1", "--steps=0", "--guidance=nan", "--draws=-1", "--reference=other"])
def test_wrong_usage_is_said_in_one_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model=m", "--results=r", option]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert option.split("=")[0] in errors
