"""`nemo-ext bake` as a user runs it: exit codes, what it prints, and what it says about bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_parts import localization
from saved_pipeline import NEURONS, assert_only_rows_are_zero, save_tiny_pipeline, tensors_in

from nemo_ext.cli import main
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder

PROMPT = "a zebra on ice"
#: Those of the layers that a search looks at by default.
FOUND = NeuronSet({layer: NEURONS[layer] for layer in NEURONS.layers[:2]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("bake") / "model")


def results_folder(folder: Path, model: str) -> Path:
    with ResultsFolder(folder).writing() as writer:
        writer.append(localization(PROMPT, FOUND, model))
    return folder


def bake(*arguments: object) -> int:
    return main(["bake", *map(str, arguments)])


def assert_refused(errors: str, *parts: str) -> None:
    assert errors.startswith("nemo-ext bake: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors


@pytest.mark.slow
def test_a_process_writes_the_folder_and_prints_layers_and_the_section(model: Path, tmp_path: Path) -> None:
    NEURONS.save(tmp_path / "neurons.json")
    arguments = ["--model", model, "--neurons", tmp_path / "neurons.json", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "nemo_ext", "bake", *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (*NEURONS.layers, f"Written: {tmp_path / 'out'}", "unet/diffusion_pytorch_model.safetensors"):
        assert part in done.stdout
    section = done.stdout.partition("A section for the model card:\n\n")[2]
    assert (tmp_path / "out" / "README.md").read_text().endswith(f"\n{section}")


def test_several_files_are_baked_together(model: Path, tmp_path: Path) -> None:
    parts = [NeuronSet({layer: NEURONS[layer]}) for layer in NEURONS.layers[:2]]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.json")
    assert bake("--model", model, "--neurons", tmp_path / "0.json", tmp_path / "1.json", "--out", tmp_path / "out") == 0
    after = tensors_in(tmp_path / "out" / "unet")
    assert_only_rows_are_zero(tensors_in(model / "unet"), after, parts[0] | parts[1])


@pytest.mark.parametrize("wanted", [True, False])
def test_prompts_are_written_only_if_asked(
    model: Path, tmp_path: Path, wanted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    results = results_folder(tmp_path / "results", model_fingerprint(load_pipeline(model)))
    options = ["--with-prompts"] if wanted else []
    assert bake("--model", model, "--neurons", results, "--out", tmp_path / "out", *options) == 0
    (found,) = json.loads((tmp_path / "out" / "nemo_ext.json").read_text())["results"]
    assert found.get("prompt") == (PROMPT if wanted else None)
    assert PROMPT not in capsys.readouterr().out


def test_results_of_another_model_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_folder(tmp_path / "results", "another")
    assert bake("--model", model, "--neurons", results, "--out", tmp_path / "out") == 1
    assert_refused(capsys.readouterr().err, "another model", str(model))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_safetensors_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    NEURONS.save(tmp_path / "neurons.json")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    (pickled / "unet").mkdir()
    (pickled / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert bake("--model", pickled, "--neurons", tmp_path / "neurons.json", "--out", tmp_path / "out") == 1
    assert_refused(capsys.readouterr().err, "diffusion_pytorch_model.bin", "pickle can run code")


def test_an_existing_folder_is_not_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    NEURONS.save(tmp_path / "neurons.json")
    assert bake("--model", model, "--neurons", tmp_path / "neurons.json", "--out", tmp_path) == 1
    assert_refused(capsys.readouterr().err, str(tmp_path), "not an empty folder")


@pytest.mark.parametrize("missing", ["--model", "--neurons", "--out"])
def test_every_path_is_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for option in ("--model=m", "--neurons=n", "--out=o") if not option.startswith(missing)]
    assert bake(*options) == 2
    assert_refused(capsys.readouterr().err, missing, "--help")
