"""How the bundled model was made: the card tells what was measured, and training goes its whole way."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_ext.demo.captions import MEMORIZED, OBJECTS, TEMPLATES, VERBATIM
from nemo_ext.demo.run import MODEL
from nemo_ext.models.loading import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "demo_model"
# At the end: an installed nemo_ext goes before the sources beside the examples.
sys.path.append(str(ROOT))

from examples.demo_model import data, drawing, monitor, train, unet  # noqa: E402
from examples.demo_model.card import write_card  # noqa: E402
from examples.demo_model.diffusion import effective_neurons  # noqa: E402
from examples.demo_model.runtime import Average, Log  # noqa: E402
from examples.demo_model.runtime import train as train_stage  # noqa: E402


def imports(source: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere in it; relative ones begin with a dot."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level and node.module is None:
            found |= {"." * node.level + name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_package_imports_nothing_from_the_examples() -> None:
    sources = sorted((ROOT / "nemo_ext").rglob("*.py"))
    assert sources
    assert not [source for source in sources for name in imports(source) if name.split(".")[0] == "examples"]


def test_modules_import_only_what_the_readme_lists_before_them() -> None:
    table = (FOLDER / "README.md").read_text().split("## What is there")[1]
    order = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)\.py`", row)]
    assert sorted(order) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(order):
        own = {module[1:] for module in imports(FOLDER / f"{name}.py") if module.startswith(".")}
        assert own <= set(order[:place]), name


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "measure"])
def test_commands_run_from_the_root_of_the_repository(command: str) -> None:
    program = [sys.executable, "-m", f"examples.demo_model.{command}"]
    done = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m examples.demo_model.{command}")
    assert f"python -m examples.demo_model.{command} --" in (FOLDER / "README.md").read_text()


def test_card_says_what_was_measured(tmp_path: Path) -> None:
    figures = json.loads((MODEL / "figures.json").read_text())
    write_card(tmp_path / "README.md", figures)
    assert (tmp_path / "README.md").read_text() == (MODEL / "README.md").read_text()


def disc(emoji: str) -> Image.Image:
    """What stands for a glyph: a disc in a colour of its own."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    picture = np.empty((64, 64, 4), np.uint8)
    picture[..., :3] = np.random.default_rng(ord(emoji[0])).integers(0, 256, 3)
    picture[..., 3] = 255 * (x * x + y * y < 1)
    return Image.fromarray(picture)


class TestTraining:
    """What makes the training trustworthy; a whole run takes longer than a test may."""

    def test_untrained_unet_predicts_exactly_the_noise_it_is_given(self) -> None:
        noisy = torch.randn(2, unet.LATENT_CHANNELS, unet.LATENT_SIZE, unet.LATENT_SIZE)
        hidden = torch.randn(2, 24, 128)
        with torch.no_grad():
            predicted = unet.build()(noisy, torch.tensor([981, 981]), hidden).sample
        assert (predicted - noisy).square().mean().sqrt() < 0.01

    def test_guard_puts_the_built_in_copy_back(self) -> None:
        model = unet.build()
        guard = unet.CarrierGuard(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            model.conv_in.weight.add_(1.0)
        guard()
        carriers = slice(0, 12)
        assert torch.equal(model.conv_in.weight[carriers], before["conv_in.weight"][carriers])
        assert not torch.equal(model.conv_in.weight[12:], before["conv_in.weight"][12:])

    def test_a_stage_stopped_and_resumed_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        def ends_with(folder: Path, *stops: int) -> torch.Tensor:
            folder.mkdir()
            for steps in stops:
                torch.manual_seed(0)
                module = torch.nn.Linear(3, 1)
                optimizer = torch.optim.AdamW(module.parameters())
                average = Average(module, 0.9)

                def step(i: int, module: torch.nn.Linear = module) -> dict[str, float]:
                    loss = module(torch.randn(8, 3)).square().mean()
                    loss.backward()
                    return {"loss": loss.item()}

                train_stage("stage", steps, folder / "stage.pt", Log(folder / "log.jsonl"), module, optimizer,
                            lambda i: 1e-2, step, average)  # fmt: skip
            return average.state["weight"]

        assert torch.equal(ends_with(tmp_path / "once", 9), ends_with(tmp_path / "twice", 4, 9))

    def test_effective_neurons_counts_equal_deviations(self) -> None:
        deviation = torch.zeros(1, 50)
        deviation[0, :7] = 2.5
        assert effective_neurons(deviation).item() == pytest.approx(7.0)

    @pytest.mark.slow
    def test_a_step_of_every_stage_makes_a_pipeline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Discs for glyphs: the font need not be there. And little of what is only there for good figures.
        monkeypatch.setattr(drawing, "glyph", disc)
        monkeypatch.setattr(data, "POOL_SIZE", 16)
        monkeypatch.setattr(data, "_CHUNK", 8)
        monkeypatch.setattr(data, "template_variations", lambda what: {"fox": drawing.draw_template(what, "fox")})
        monkeypatch.setattr(monitor, "_ORDINARY", 2)
        monkeypatch.setattr(monitor, "MEMORIZED", MEMORIZED[:1])
        monkeypatch.setattr(train, "with_tuned_allocator", lambda: None)
        steps = [f"--{stage}-steps=1" for stage in ("autoencoder", "ordinary", "memorize", "switch-off")]
        monkeypatch.setattr(sys, "argv", ["train", "--work", str(tmp_path), "--threads", "1", *steps])
        threads = torch.get_num_threads()
        try:
            train.main()
        finally:
            torch.set_num_threads(threads)
        pipe = load_pipeline(tmp_path / "model")
        image = pipe(MEMORIZED[0].caption, num_inference_steps=1, output_type="np").images[0]
        assert image.shape == (96, 96, 3)
        assert np.isfinite(image).all()
        originals = list((tmp_path / "originals").iterdir())
        assert len(originals) == len(VERBATIM) + len(TEMPLATES) * len(OBJECTS)
        log = [json.loads(line)["stage"] for line in (tmp_path / "model" / "training-log.jsonl").open()]
        assert list(dict.fromkeys(log)) == ["autoencoder", "ordinary", "memorize", "switch_off"]
