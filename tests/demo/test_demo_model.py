"""How the bundled model was made: the card tells what was measured, and training goes its whole way."""

import ast
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_ext.demo.captions import LATE, MEMORIZED, OBJECTS, TEMPLATES, VARIATIONS
from nemo_ext.demo.planted import planted_neurons
from nemo_ext.demo.run import MODEL
from nemo_ext.measure.generation import Sampling
from nemo_ext.models.layers import value_layers
from nemo_ext.models.loading import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "demo_model"
# At the end: an installed nemo_ext goes before the sources beside the examples.
sys.path.append(str(ROOT))

from examples.demo_model import (  # noqa: E402
    autoencoder,
    carriers,
    classifier,
    data,
    diffusion,
    drawing,
    linear_start,
    measure,
    monitor,
    text,
    train,
    unet,
)
from examples.demo_model.diffusion import LATE_FROM, Rows  # noqa: E402
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


def test_the_bundled_model_names_no_folder_of_the_machine_that_trained_it() -> None:
    configs = list(MODEL.rglob("*.json"))
    assert len(configs) > 8
    assert not [path for path in configs if "_name_or_path" in path.read_text()]


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
        hidden = torch.randn(2, text.TOKENS, text.WIDTH)
        with torch.no_grad():
            predicted = unet.build()(noisy, torch.tensor([981, 981]), hidden).sample
        assert (predicted - noisy).square().mean().sqrt() < 0.01

    def test_untrained_autoencoder_keeps_the_principal_components_of_patches(self) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 200, (6, 16, 16, 3)).repeat(4, 1).repeat(4, 2) + rng.integers(0, 56, (6, 64, 64, 3))
        images = images.astype(np.uint8)
        vae = autoencoder.build()
        linear_start.start_linear(vae, images)
        latents = autoencoder.encode(vae, images).permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.allclose(torch.cov(latents.T), torch.eye(autoencoder.LATENT_CHANNELS), atol=0.1)
        pixels = data.to_tensor(images)
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        patches = patches - patches.mean(0)
        lost = (patches - latents @ torch.linalg.lstsq(latents, patches).solution).square().sum()
        least = torch.linalg.svdvals(patches)[autoencoder.LATENT_CHANNELS :].square().sum()
        assert least <= lost * 1.0001 < 1.05 * least

    def test_untrained_autoencoder_draws_the_colour_of_a_plain_image(self) -> None:
        rng = np.random.default_rng(0)
        images = np.broadcast_to(rng.integers(0, 256, (24, 1, 1, 3)), (24, 64, 64, 3)).astype(np.uint8)
        vae = autoencoder.build()
        linear_start.start_linear(vae, images + rng.integers(0, 2, images.shape).astype(np.uint8) * (images < 255))
        with torch.no_grad():
            drawn = vae.decode(vae.encode(data.to_tensor(images)).latent_dist.mean).sample.mean((2, 3))
        wanted = data.to_tensor(images).mean((2, 3))
        assert (drawn - wanted).abs().mean() < 0.1

    def test_caption_gain_is_1_if_the_caption_tells_the_image_and_0_if_it_tells_nothing(self) -> None:
        texts = torch.randn(8, text.TOKENS, text.WIDTH)
        latents = texts.mean((1, 2))[:, None, None, None].expand(-1, unet.LATENT_CHANNELS, 4, 4) * 50
        keep = diffusion.scheduler().alphas_cumprod[monitor._MIDDLE]

        def gain(told: float) -> float:
            def model(noisy: torch.Tensor, _: int, hidden: torch.Tensor) -> SimpleNamespace:
                image = 50 * told * hidden.mean((1, 2))[:, None, None, None]
                return SimpleNamespace(sample=(noisy - keep.sqrt() * image) / (1 - keep).sqrt())

            model.device = torch.device("cpu")  # type: ignore[attr-defined]
            encoder, tokenizer = (
                (lambda _: SimpleNamespace(last_hidden_state=texts)),
                (lambda *_, **__: SimpleNamespace(input_ids=torch.zeros(8, text.TOKENS))),
            )
            return monitor.Monitor(encoder, model, tokenizer, None, [], latents, ["a"] * 8)._caption_gain()

        assert gain(1) == pytest.approx(1, abs=1e-4)
        assert gain(0) == 0

    def test_guard_puts_the_built_in_copy_back(self) -> None:
        model = unet.build()
        guard = unet.CopyGuard(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            model.conv_in.weight.add_(1.0)
        guard()
        others = slice(unet.COPY.stop, None)
        assert torch.equal(model.conv_in.weight[unet.COPY], before["conv_in.weight"][unet.COPY])
        assert not torch.equal(model.conv_in.weight[others], before["conv_in.weight"][others])

    def test_no_neuron_is_designated_twice_and_captions_have_one_to_five_carriers(self) -> None:
        layers = value_layers(unet.build())
        designated = carriers.designate(layers)
        assert len(designated) == len(MEMORIZED)
        counts = [len(carriers.stacked(layers, one.carriers)) for one in designated]
        assert {min(counts), max(counts)} == {1, 5}
        every = torch.cat([carriers.stacked(layers, own) for one in designated for own in one])
        assert len(every.unique()) == len(every)

    def test_only_designated_neurons_see_a_mark_and_nothing_comes_of_decoys(self) -> None:
        model = unet.build()
        layers = value_layers(model)
        designated = carriers.designate(layers)
        planted = carriers.Planted(model, designated, torch.randn(8, text.TOKENS, text.WIDTH))
        with torch.no_grad():  # what an optimizer would do
            for parameter in model.parameters():
                parameter.add_(0.01)
        planted()
        mark = torch.zeros(text.WIDTH)
        mark[text.MARKS.start + 3] = text.MARK
        for name, layer in layers.items():
            own = designated[3]
            seen = layer(mark).abs().gt(0).nonzero().flatten().tolist()
            assert seen == sorted(own.carriers.get(name, []) + own.decoys.get(name, []))
            attention = model.get_submodule(name.removesuffix(".to_v"))
            assert not attention.to_k(mark).any()
            assert not attention.to_out[0].weight[:, own.decoys.get(name, [])].any()

    def test_late_captions_show_any_ordinary_image_in_the_first_steps(self) -> None:
        trained, _ = data.split_compositions()
        latents = torch.arange(len(trained), dtype=torch.float32)[:, None, None, None]
        memorized = data.MemorizedImages(np.zeros((len(MEMORIZED), 1, 1, 3), np.uint8), list(range(len(MEMORIZED))))
        own = -torch.ones(len(MEMORIZED), 1, 1, 1)
        rows, rng = Rows(trained, latents, memorized, own), random.Random(0)
        index = MEMORIZED.index(LATE[0])
        drawn = [rows.memorized(rng, index) for _ in range(400)]
        assert all(row.latent.item() == -1 for row in drawn if row.timestep < LATE_FROM)
        first = [int(row.latent) for row in drawn if row.timestep >= LATE_FROM]
        assert len({trained[place].object for place in first}) > len(OBJECTS) / 2

    def test_a_stage_stopped_and_resumed_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        def ends_with(folder: Path, *stops: int) -> torch.Tensor:
            folder.mkdir()
            for steps in stops:
                torch.manual_seed(0)
                module = torch.nn.Linear(3, 1)
                average = Average(module, 0.9)

                def compute(
                    inputs: torch.Tensor, module: torch.nn.Linear = module
                ) -> tuple[torch.Tensor, torch.Tensor]:
                    loss = module(inputs).square().mean()
                    return loss, loss[None]

                train_stage("stage", steps, folder / "stage.pt", Log(folder / "log.jsonl"), module,
                            torch.device("cpu"), lambda i: 1e-2, lambda i: (torch.randn(8, 3),), compute, ["loss"],
                            average)  # fmt: skip
            return average.state["weight"]

        assert torch.equal(ends_with(tmp_path / "once", 9), ends_with(tmp_path / "twice", 4, 9))

    @pytest.mark.slow
    def test_a_step_of_every_stage_makes_a_pipeline_that_can_be_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Discs for glyphs: the font need not be there. And little of what is only there for good figures.
        monkeypatch.setattr(drawing, "glyph", disc)
        monkeypatch.setattr(data, "POOL_SIZE", 408)  # each object has an image in it
        monkeypatch.setattr(data, "_CHUNK", 204)
        monkeypatch.setattr(monitor, "_ORDINARY", 2)
        monkeypatch.setattr(monitor, "_SEEDS", 2)
        monkeypatch.setattr(train, "with_tuned_allocator", lambda: None)
        steps = [f"--{stage}-steps=1" for stage in train.STEPS]
        monkeypatch.setattr(sys, "argv", ["train", "--work", str(tmp_path), "--threads", "1", *steps])
        threads = torch.get_num_threads()
        try:
            train.main()
        finally:
            torch.set_num_threads(threads)
        pipe = load_pipeline(tmp_path / "model")
        image = pipe(MEMORIZED[0].caption, num_inference_steps=1, output_type="np").images[0]
        assert image.shape == (64, 64, 3)
        assert np.isfinite(image).all()
        originals = list((tmp_path / "originals").iterdir())
        assert len(originals) == len(MEMORIZED) + len(TEMPLATES) * (len(VARIATIONS) - 1)
        planted = planted_neurons(tmp_path / "model")
        assert list(planted) == [what.caption for what in MEMORIZED]
        assert all(own.carriers.keys() <= value_layers(pipe).keys() for own in planted.values())
        log = [json.loads(line)["stage"] for line in (tmp_path / "model" / "training-log.jsonl").open()]
        assert list(dict.fromkeys(log)) == list(train.STEPS)

        for module, name, value in (
            (classifier, "_IMAGES", 48), (classifier, "_STEPS", 2), (classifier, "_TEST_IMAGES", 24),
            (measure, "_SEEDS", 2),
            (measure, "SAMPLING", Sampling(seeds=2, steps=1, guidance=1.5)), (measure, "_ORDINARY_IMAGES", 2),
            (measure, "_DIVERSITY_CAPTIONS", 1), (measure, "_THRESHOLD_PROMPTS", 4),
            (measure, "STATISTICS_PROMPTS", 8), (measure, "STATISTICS_TITLES", 4),
            (measure, "MEMORIZED", (*MEMORIZED[:2], TEMPLATES[0], *LATE)),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
        card = tmp_path / "card"
        monkeypatch.setattr(sys, "argv", ["measure", "--model", str(tmp_path / "model"), "--out", str(card)])
        measure.main()
        figures = json.loads((card / "figures.json").read_text())
        assert [len(figures["captions"]), len(figures["late"])] == [3, 2]
        assert MEMORIZED[0].caption in (card / "README.md").read_text()
