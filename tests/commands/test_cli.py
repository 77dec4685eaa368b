"""The `nemo-ext` command: the whole way through real processes, and what it says about bad input."""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from tiny_pipeline import Planted

from nemo_ext import commands
from nemo_ext.cli import main
from nemo_ext.commands import localize
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.measure.threshold import Threshold
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder, prompt_name, read_results

SUBCOMMANDS = ("stats", "threshold", "localize", "generate", "evaluate", "neurons", "bake", "report", "demo", "info")

#: An option as a help text names it; "nemo-ext" and "published-code" hold none.
OPTION = r"(?<![\w-])--?[a-z][a-z-]*"


def nemo_ext(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: in a process of its own."""
    return subprocess.run(command_line(*arguments), text=True, capture_output=True, check=False, timeout=300)


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nemo_ext", *map(str, arguments)]


def assert_one_sentence(errors: str, *parts: str) -> None:
    """What a user sees on stderr: one line, no traceback, the named things in it."""
    assert errors.count("\n") == 1, errors
    assert errors.startswith("nemo-ext")
    assert "Traceback" not in errors
    for part in parts:
        assert part in errors


@pytest.fixture(scope="module")
def captions(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ordinary prompts as some editors leave them: a byte order mark, blank lines, Windows line ends."""
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(planted.ordinary_prompts).encode() + b"\r\n")
    return file


@pytest.fixture(scope="module")
def suspects(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of which the first is memorized."""
    file = tmp_path_factory.mktemp("suspects") / "suspects.txt"
    file.write_text(f"{planted.memorized_prompt}\n{planted.ordinary_prompts[0]}\n")
    return file


@pytest.fixture(scope="module")
def statistics(model: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `nemo-ext stats` wrote."""
    out = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    assert main(["stats", "--model", str(model), "--prompts", str(captions), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def threshold(model: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `nemo-ext threshold` wrote."""
    out = tmp_path_factory.mktemp("threshold") / "threshold.json"
    files = ["--model", str(model), "--prompts", str(captions), "--out", str(out)]
    assert main(["threshold", *files, "--seeds", "3", "--image-prompts", "6"]) == 0
    return out


@pytest.fixture(scope="module")
def results(
    model: Path,
    suspects: Path,
    statistics: Path,
    threshold: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What `nemo-ext localize` wrote."""
    out = tmp_path_factory.mktemp("work") / "results"
    done = nemo_ext(
        *("localize", "--model", model, "--prompts", suspects, "--statistics", statistics),
        *("--threshold", threshold, "--seeds", 3, "--out", out),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return out


class TestHelp:
    def test_the_top_level_shows_the_order_of_work(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        places = [shown.index(f"nemo-ext {step}") for step in SUBCOMMANDS[:5]]
        assert places == sorted(places)

    @pytest.mark.parametrize("subcommand", SUBCOMMANDS)
    def test_each_subcommand_gives_an_example(self, subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([subcommand, "--help"]) == 0
        assert f"example:\n  nemo-ext {subcommand}" in capsys.readouterr().out

    def test_every_file_of_a_command_is_a_command_of_the_parser(self, capsys: pytest.CaptureFixture[str]) -> None:
        files = {file.stem for file in Path(commands.__file__).parent.glob("*.py")} - {"__init__", "shared", "devices"}
        assert files == set(SUBCOMMANDS)
        assert main(["--help"]) == 0
        listed = capsys.readouterr().out.partition("  COMMAND\n")[2].partition("\n\n")[0]
        assert " ".join(listed.split()) == " ".join(f"{one.NAME} {one.SUMMARY}" for one in commands.COMMANDS)
        for name, command in zip(SUBCOMMANDS, commands.COMMANDS, strict=True):
            assert (command.NAME, command.__name__) == (name, f"nemo_ext.commands.{name}")

    @pytest.mark.parametrize("subcommand", SUBCOMMANDS)
    def test_each_option_of_a_subcommand_is_described(
        self, subcommand: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([subcommand, "--help"]) == 0
        usage, _, options = capsys.readouterr().out.partition("\n\n")
        # An option is followed by its description, on the same line after a gap, or on the next one.
        described = re.findall(r"^  (-\S.*?)(?:  +|\n {4,})\w", options, re.MULTILINE)
        flags = {flag for option in described for flag in re.findall(OPTION, option)}
        assert {"--help", "--debug"} < flags
        assert set(re.findall(OPTION, usage)) <= flags

    def test_help_waits_for_no_heavy_import(self) -> None:
        program = (
            "import sys; from nemo_ext.cli import main; main(['localize', '--help']);"
            "sys.exit(str({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
        assert done.stderr == "set()\n"


class TestWrongUsage:
    """Exit code 2, before anything is loaded."""

    LOCALIZE = ("localize", "--model=m", "--prompt=p", "--statistics=s", "--out=o")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "COMMAND"),
            (("localise",), "localise"),
            (("stats", "--model=m", "--prompts=p"), "--out"),
            (("threshold", "--model=m", "--prompts=p", "--out=o", "--seeds=1"), "of 2 or more"),
            (("stats", "--model=m", "--prompts=p", "--out=o", "--batch-size=0"), "of 1 or more"),
            (("stats", "--model=m", "--prompts=p", "--out=o", "--device=tpu"), "cpu, cuda"),
            ((*LOCALIZE, "--threshold=high"), "neither a number nor a file"),
            ((*LOCALIZE, "--threshold=nan"), "between 0 and 1"),
            ((*LOCALIZE, "--threshold=.4", "--prompts=f"), "not allowed with"),
            ((*LOCALIZE, "--threshold=.4", "--search=fast"), "fast"),
            (("generate", "--model=m", "--prompt= ", "--out=o"), "empty"),
            (("generate", "--model=m", "--prompt=p", "--out=o", "--guidance=nan"), "--guidance"),
        ],
    )
    def test_is_said_in_one_sentence(
        self, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        assert_one_sentence(capsys.readouterr().err, said, "--help")


def test_several_prompts_are_all_searched() -> None:
    parser = argparse.ArgumentParser()
    localize.add_arguments(parser)
    files = [f"--{name}=f" for name in ("model", "statistics", "out")]
    args = parser.parse_args([*files, "--threshold=.4", "--prompt=a zebra", "--prompt=a camel"])
    assert [prompt.text for prompt in localize._prompts(args)] == ["a zebra", "a camel"]


@pytest.mark.slow
class TestTheWholeWay:
    def test_statistics_count_every_caption(self, planted: Planted, statistics: Path) -> None:
        assert ActivationStatistics.load(statistics).count == len(planted.ordinary_prompts)

    def test_threshold_keeps_the_score_of_every_caption(self, planted: Planted, threshold: Path) -> None:
        kept = Threshold.load(threshold)
        assert len(kept.scores) == len(planted.ordinary_prompts)
        assert 0 < kept.value < 1

    def test_localize_writes_one_object_per_prompt(self, results: Path, suspects: Path) -> None:
        lines = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == suspects.read_text().splitlines()
        for field in (
            *("memorized", "score_before", "score_after", "initial_neurons", "neurons"),
            *("unet_samples", "seconds", "certificate", "protocol"),
        ):
            assert all(field in line for line in lines)

    def test_localize_finds_the_planted_neurons_and_nothing_for_an_ordinary_prompt(
        self, planted: Planted, results: Path
    ) -> None:
        memorized, ordinary = read_results(results)
        assert memorized.neurons == planted.neurons
        assert not ordinary.memorized
        file = results / "neurons" / f"{prompt_name(0, memorized.prompt)}.json"
        assert list((results / "neurons").iterdir()) == [file]
        assert NeuronSet.load(file) == planted.neurons

    def test_threshold_measures_images_of_some_captions_too(self, threshold: Path) -> None:
        images = Threshold.load(threshold).images
        assert images is not None
        assert len(images.scores) == 6
        assert images.sampling == Sampling(seeds=4, steps=25, guidance=7.5)

    def test_localize_verifies_on_images_and_keeps_them(self, results: Path) -> None:
        for index, found in enumerate(read_results(results)):
            assert found.verdict is not None
            assert found.verified is (True if found.memorized else None)
            images = ResultsFolder(results).images(index, found.prompt, "before")
            assert tuple(images) == found.verdict.seeds

    def test_images_differ_with_the_neurons_off(
        self, planted: Planted, model: Path, results: Path, tmp_path: Path
    ) -> None:
        name = prompt_name(0, planted.memorized_prompt)
        out = tmp_path / "images"
        done = nemo_ext(
            *("generate", "--model", model, "--prompt", planted.memorized_prompt),
            *("--neurons", results / "neurons" / f"{name}.json", "--seeds", 3),
            *("--first-seed", 5, "--steps", 2, "--batch-size", 2, "--out", out),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert {file.name for file in out.iterdir()} == {
            *(f"{row}-{seed}.png" for row in ("before", "after") for seed in (5, 6, 7)),
            *("contact-sheet.png", "generation.json"),
        }
        with Image.open(out / "before-5.png") as before, Image.open(out / "after-5.png") as after:
            assert before.tobytes() != after.tobytes()
        description = json.loads((out / "generation.json").read_text())
        assert description["seeds"] == [5, 6, 7]
        assert description["neurons"] == planted.neurons.to_dict()

    def test_report_shows_every_prompt(self, results: Path, suspects: Path, tmp_path: Path) -> None:
        out = tmp_path / "report.html"
        done = nemo_ext("report", "--results", results, "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        page = out.read_text(encoding="utf-8")
        assert all(prompt in page for prompt in suspects.read_text().splitlines())


class TestGoingOn:
    @pytest.mark.slow
    def test_ctrl_c_says_how_to_go_on_and_the_next_run_keeps_what_is_done(
        self, model: Path, statistics: Path, tmp_path: Path
    ) -> None:
        prompts, out = tmp_path / "prompts.txt", tmp_path / "results"
        prompts.write_text("\n".join(f"zebra number {number}" for number in range(200)))
        arguments = (
            *("localize", "--model", model, "--statistics", statistics, "--threshold", 0.2, "--no-verify"),
            *("--seeds", 3, "--out", out, "--prompts", prompts),
        )
        process = subprocess.Popen(
            command_line(*arguments),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell without job control lets its background commands, and so these tests, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 300
        while not (out / "results.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            # Python drops the exception where the signal meets the callback of a weak reference, or a finalizer.
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 130
        assert_one_sentence(errors, str(out), "again")
        done = (out / "results.jsonl").read_text().splitlines()
        assert 1 <= len(done) < 200

        prompts.write_text("\n".join(f"zebra number {number}" for number in range(len(done) + 1)))
        assert main([*map(str, arguments)]) == 0
        lines = (out / "results.jsonl").read_text().splitlines()
        assert lines[:-1] == done
        assert len(list((out / "neurons").iterdir())) == len(lines)

    @pytest.mark.slow
    def test_results_of_other_settings_are_not_mixed(
        self,
        model: Path,
        statistics: Path,
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = (results / "results.jsonl").read_bytes()
        code = main(
            [
                *(
                    "localize",
                    "--model",
                    str(model),
                    "--prompt",
                    "a new one",
                    "--out",
                    str(results),
                ),
                *("--statistics", str(statistics), "--threshold", "0.02", "--seeds", "3", "--no-verify"),
            ]
        )
        assert code == 1
        assert_one_sentence(capsys.readouterr().err, str(results))
        assert (results / "results.jsonl").read_bytes() == before


class TestInfo:
    def test_tells_versions_and_build_for_people_and_for_programs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info"]) == 0
        table = capsys.readouterr().out
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["packages"]["torch"] in table
        assert facts["build"]["compiler"].split()[0] in table

    def test_the_version_is_the_packages(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"nemo-ext {version('nemo_ext')}\n"


class TestBadInput:
    """Exit code 1, one sentence on stderr, and nothing written."""

    @pytest.fixture
    def failing(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
        """Run a command line that must fail; `--out` is added and must not appear."""

        def run(*arguments: object, out: str = "out", says: tuple[str, ...]) -> None:
            written = tmp_path / "written"
            written.mkdir()
            code = main([*map(str, arguments), "--out", str(written / out)])
            assert code == 1
            assert_one_sentence(capsys.readouterr().err, *says)
            assert list(written.rglob("*")) == []

        return run

    def test_missing_model(self, failing: Callable[..., None], captions: Path) -> None:
        failing(
            *("stats", "--model", "no/such/folder", "--prompts", captions),
            out="s.safetensors",
            says=("no/such/folder", "doesn't exist"),
        )

    def test_a_folder_that_is_no_pipeline(self, failing: Callable[..., None], captions: Path, tmp_path: Path) -> None:
        failing(
            *("threshold", "--model", tmp_path, "--prompts", captions),
            out="t.json",
            says=("model_index.json",),
        )

    def test_another_kind_of_pipeline(self, failing: Callable[..., None], captions: Path, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        failing(
            *("stats", "--model", tmp_path, "--prompts", captions),
            out="s.safetensors",
            says=("FluxPipeline", "StableDiffusionPipeline"),
        )

    def test_weights_that_are_pickles(
        self, failing: Callable[..., None], model: Path, captions: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        failing(
            *("stats", "--model", copy, "--prompts", captions),
            out="s.safetensors",
            says=("only safetensors are read", "unet"),
        )

    def test_damaged_weights(self, failing: Callable[..., None], model: Path, captions: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        failing(
            *("stats", "--model", copy, "--prompts", captions),
            out="s.safetensors",
            says=(str(copy), "can't be loaded"),
        )

    def test_nan_in_weights(self, failing: Callable[..., None], model: Path, captions: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        tensors["conv_in.weight"][0] = torch.nan
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
        failing(
            *("stats", "--model", copy, "--prompts", captions),
            out="s.safetensors",
            says=("conv_in.weight", "NaN"),
        )

    def test_nan_in_statistics(
        self, failing: Callable[..., None], model: Path, statistics: Path, tmp_path: Path
    ) -> None:
        damaged = tmp_path / "damaged.safetensors"
        with safetensors.safe_open(statistics, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors["mean"][0] = torch.nan
            safetensors.torch.save_file(tensors, damaged, file.metadata())
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4),
            *("--statistics", damaged),
            says=(str(damaged), "NaN"),
        )

    def test_statistics_of_another_model(
        self, failing: Callable[..., None], model: Path, statistics: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        for name in tensors:
            if name.endswith("attn2.to_v.weight"):
                tensors[name] += 1
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
        failing(
            *("localize", "--model", copy, "--prompt", "p", "--threshold", 0.4),
            *("--statistics", statistics),
            says=("another model", "collect them again"),
        )

    def test_verification_without_a_threshold_for_images(
        self, failing: Callable[..., None], model: Path, statistics: Path
    ) -> None:
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4, "--statistics", statistics),
            says=("verification needs τ_image", "nemo-ext threshold", "--no-verify"),
        )

    def test_sscd_file_that_is_none(self, failing: Callable[..., None], model: Path, statistics: Path) -> None:
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4, "--statistics", statistics),
            *("--sscd", statistics),
            says=(str(statistics), "is not a TorchScript file"),
        )

    def test_originals_of_other_prompts(
        self, failing: Callable[..., None], model: Path, statistics: Path, tmp_path: Path
    ) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
        originals = tmp_path / "originals.csv"
        originals.write_text("prompt,image\nanother prompt,image.png\n")
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4, "--statistics", statistics),
            *("--originals", originals),
            says=(str(originals), "none of the prompts"),
        )

    def test_nan_in_a_threshold_file(
        self, failing: Callable[..., None], model: Path, statistics: Path, tmp_path: Path
    ) -> None:
        damaged = tmp_path / "threshold.json"
        Threshold(
            value=float("nan"),
            mean=0.3,
            std=0.1,
            scores=(0.2, 0.4),
            seeds=3,
            protocol=Protocol.paper(),
            fingerprint="",
            model_name="",
        ).save(damaged)
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", damaged),
            *("--statistics", statistics),
            says=(str(damaged), "nan"),
        )

    def test_unknown_layer(self, failing: Callable[..., None], model: Path, captions: Path) -> None:
        failing(
            *("stats", "--model", model, "--prompts", captions, "--layers", "mid_block.to_v"),
            out="s.safetensors",
            says=("mid_block.to_v",),
        )

    def test_neurons_of_another_model(self, failing: Callable[..., None], model: Path, tmp_path: Path) -> None:
        neurons = tmp_path / "neurons.json"
        NeuronSet({"no.such.layer": [1]}).save(neurons)
        failing(
            *("generate", "--model", model, "--prompt", "p", "--neurons", neurons),
            says=("no.such.layer",),
        )

    @pytest.mark.parametrize(("content", "said"), [(b" \n\n", "empty"), (b"caf\xe9", "UTF-8"), (None, "doesn't exist")])
    def test_prompt_files(
        self,
        failing: Callable[..., None],
        content: bytes | None,
        said: str,
        model: Path,
        tmp_path: Path,
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        if content is not None:
            prompts.write_bytes(content)
        failing(
            *("stats", "--model", model, "--prompts", prompts),
            out="s.safetensors",
            says=(str(prompts), said),
        )

    def test_one_caption_has_no_standard_deviation(
        self, failing: Callable[..., None], model: Path, tmp_path: Path
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("only one")
        failing(*("stats", "--model", model, "--prompts", prompts), out="s.safetensors", says=("two",))

    def test_missing_statistics(self, failing: Callable[..., None], model: Path) -> None:
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4),
            *("--statistics", "nowhere.safetensors"),
            says=("nowhere.safetensors", "nemo-ext stats"),
        )

    def test_missing_neurons(self, failing: Callable[..., None], model: Path) -> None:
        failing(
            *("generate", "--model", model, "--prompt", "p", "--neurons", "nowhere.json"),
            says=("nowhere.json", "nemo-ext localize"),
        )

    def test_a_file_that_holds_something_else(self, failing: Callable[..., None], model: Path, captions: Path) -> None:
        failing(
            *("localize", "--model", model, "--prompt", "p", "--threshold", 0.4),
            *("--statistics", captions),
            says=(str(captions), "does not hold activation statistics"),
        )

    def test_missing_results(self, failing: Callable[..., None], tmp_path: Path) -> None:
        failing("report", "--results", tmp_path, out="r.html", says=("results.jsonl",))

    def test_damaged_results(self, failing: Callable[..., None], tmp_path: Path) -> None:
        (tmp_path / "results.jsonl").write_text('{"prompt": "cut off')
        failing("report", "--results", tmp_path, out="r.html", says=("results.jsonl",))

    def test_a_place_that_cannot_be_written(
        self, model: Path, captions: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = captions / "inside-a-file" / "stats.safetensors"
        code = main(["stats", "--model", str(model), "--prompts", str(captions), "--out", str(out)])
        assert code == 1
        assert_one_sentence(capsys.readouterr().err, str(captions), "can't be written")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_device_that_is_not_there(self, failing: Callable[..., None], model: Path, captions: Path) -> None:
        failing(
            *("stats", "--model", model, "--prompts", captions, "--device", "cuda"),
            out="s.safetensors",
            says=("cuda", "--device cpu"),
        )

    def test_control_characters_do_not_reach_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--results", "x\x1b[31mred", "--out", "report.html")
        assert main(["report", *arguments]) == 1
        assert "\x1b" not in capsys.readouterr().err

    def test_debug_gives_the_traceback(self) -> None:
        done = nemo_ext("report", "--results", "nowhere", "--out", "report.html", "--debug")
        assert done.returncode == 1
        assert "Traceback" in done.stderr
