"""`nemo_ext.bake`: the new folder gives the patched pipeline's images, and nothing else in it has changed."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_pipeline
import torch
from evaluation_parts import localization
from numpy.typing import NDArray
from saved_pipeline import NEURONS, WEIGHTS, assert_only_rows_are_zero, content, save_tiny_pipeline, tensors_in

import nemo_ext
from nemo_ext import NemoError, NeuronSet
from nemo_ext.demo import captions
from nemo_ext.models.layers import value_layers
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.state import model_fingerprint

DEMO_MODEL = Path(nemo_ext.__file__).parent / "demo" / "model"
#: The bound of docs/bake.md on pixels from 0 to 1, in float32.
BOUND = 1e-5
PROMPT = "a zebra on ice"


def images(pipe: object, prompt: str = PROMPT, *, steps: int = 2) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np").images  # type: ignore[operator,no-any-return]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("bake") / "model")


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return shutil.copytree(model, tmp_path / "model")


class TestImages:
    def test_are_bit_equal_where_both_pipelines_are_patched(self, model: Path, tmp_path: Path) -> None:
        """Then the same kernel computes both, so every weight but the neurons' is the same."""
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        original, baked = load_pipeline(model), load_pipeline(tmp_path / "out")
        with nemo_ext.patched(original, NEURONS), nemo_ext.patched(baked, NEURONS):
            assert np.array_equal(images(original), images(baked))

    def test_are_bit_equal_to_those_with_the_rows_set_to_zero_in_memory(self, model: Path, tmp_path: Path) -> None:
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        pipe = load_pipeline(model)
        with torch.no_grad():
            for layer, index in NEURONS.pairs():
                pipe.unet.get_submodule(layer).weight[index] = 0
        assert np.array_equal(images(pipe), images(load_pipeline(tmp_path / "out")))

    @pytest.mark.slow
    def test_are_those_of_the_patched_pipeline_within_the_stated_bound(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Texts as wide as in Stable Diffusion 1, where the kernel and PyTorch add in another order."""
        monkeypatch.setattr(tiny_pipeline, "TEXT_WIDTH", 768)
        save_tiny_pipeline(tmp_path / "model")
        nemo_ext.bake(tmp_path / "model", NEURONS, tmp_path / "out")
        pipe = load_pipeline(tmp_path / "model")
        untouched = images(pipe, steps=25)
        with nemo_ext.patched(pipe, NEURONS):
            patched = images(pipe, steps=25)
        baked = images(load_pipeline(tmp_path / "out"), steps=25)
        assert np.abs(baked - patched).max() <= BOUND
        assert np.abs(untouched - patched).max() > 100 * BOUND

    @pytest.mark.slow
    def test_of_the_bundled_model_need_only_diffusers(self, tmp_path: Path) -> None:
        caption = captions.VERBATIM[0].caption
        layers = value_layers(load_pipeline(DEMO_MODEL))
        neurons = NeuronSet({layer: range(0, module.out_features, 5) for layer, module in layers.items()})
        nemo_ext.bake(DEMO_MODEL, neurons, tmp_path / "out")
        program = (
            "import sys, numpy, torch; from diffusers import StableDiffusionPipeline\n"
            "folder, caption, file = sys.argv[1:]\n"
            "pipe = StableDiffusionPipeline.from_pretrained(folder)\n"
            "seed = torch.Generator().manual_seed(3)\n"
            "numpy.save(file, pipe(caption, num_inference_steps=2, generator=seed, output_type='np').images)\n"
            "sys.exit(any(name.startswith('nemo_ext') for name in sys.modules))\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "out"), caption, str(tmp_path / "images.npy")]
        subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path)
        pipe = load_pipeline(DEMO_MODEL)
        untouched = images(pipe, caption)
        with nemo_ext.patched(pipe, neurons):
            patched = images(pipe, caption)
        assert np.abs(np.load(tmp_path / "images.npy") - patched).max() <= BOUND
        assert np.abs(untouched - patched).max() > 100 * BOUND


class TestWeights:
    def test_only_the_bytes_of_the_rows_change(self, model: Path, tmp_path: Path) -> None:
        baked = nemo_ext.bake(model, NEURONS, tmp_path / "out")
        assert baked.changed == (Path("unet") / WEIGHTS,)
        before, after = ((folder / "unet" / WEIGHTS).read_bytes() for folder in (model, tmp_path / "out"))
        assert_only_rows_are_zero(tensors_in(model / "unet"), tensors_in(tmp_path / "out" / "unet"), NEURONS)
        different = sum(one != other for one, other in zip(before, after, strict=True))
        assert 0 < different <= len(NEURONS) * tiny_pipeline.TEXT_WIDTH * 4

    def test_in_several_shards_are_all_changed(self, model: Path, copied: Path, tmp_path: Path) -> None:
        whole = tensors_in(copied / "unet")
        unet = load_pipeline(copied).unet
        (copied / "unet" / WEIGHTS).unlink()
        unet.save_pretrained(copied / "unet", max_shard_size="200KB")
        assert len(list((copied / "unet").glob("*.safetensors"))) > 2
        baked = nemo_ext.bake(copied, NEURONS, tmp_path / "out")
        assert len(baked.changed) > 1
        assert_only_rows_are_zero(whole, tensors_in(tmp_path / "out" / "unet"), NEURONS)
        load_pipeline(tmp_path / "out")

    @pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
    def test_of_every_variant_are_changed(self, copied: Path, tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
        load_pipeline(copied, dtype=dtype).unet.save_pretrained(copied / "unet", variant=variant)
        baked = nemo_ext.bake(copied, NEURONS, tmp_path / "out")
        file = f"diffusion_pytorch_model.{variant}.safetensors"
        assert baked.changed == (Path("unet") / file, Path("unet") / WEIGHTS)
        for name in (file, WEIGHTS):
            before, after = (tensors_in(folder / "unet", name) for folder in (copied, tmp_path / "out"))
            assert_only_rows_are_zero(before, after, NEURONS)

    def test_of_a_folder_in_half_precision_alone_are_changed(self, model: Path, tmp_path: Path) -> None:
        half = tmp_path / "half"
        load_pipeline(model, dtype=torch.float16).save_pretrained(half, variant="fp16")
        nemo_ext.bake(half, NEURONS, tmp_path / "out")
        assert_only_rows_are_zero(tensors_in(half / "unet"), tensors_in(tmp_path / "out" / "unet"), NEURONS)
        original, baked = load_pipeline(half), load_pipeline(tmp_path / "out")
        with nemo_ext.patched(original, NEURONS):
            assert np.abs(images(original) - images(baked)).max() <= BOUND


class TestOtherFiles:
    def test_are_kept_byte_for_byte(self, model: Path, tmp_path: Path) -> None:
        original = content(model)
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        assert content(model) == original
        new = content(tmp_path / "out")
        assert new.keys() - original.keys() == {"nemo_ext.json"}
        changed = {name for name, old in original.items() if new[name] != old}
        assert changed == {f"unet/{WEIGHTS}", "README.md"}

    def test_the_model_card_gets_a_section_at_its_end(self, model: Path, tmp_path: Path) -> None:
        baked = nemo_ext.bake(model, NEURONS, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert card == (model / "README.md").read_text() + "\n" + baked.card
        for part in ("6 neurons", "| down 0.1 | 2 |", "2507.16880", "2603.06640", "nothing is known"):
            assert part in baked.card

    def test_no_model_card_is_made_up(self, copied: Path, tmp_path: Path) -> None:
        (copied / "README.md").unlink()
        nemo_ext.bake(copied, NEURONS, tmp_path / "out")
        assert not (tmp_path / "out" / "README.md").exists()

    def test_behind_links_are_copied(self, model: Path, tmp_path: Path) -> None:
        """A snapshot in the cache of a hub has links to files."""
        linked = tmp_path / "linked"
        for file in model.rglob("*"):
            if file.is_file():
                link = linked / file.relative_to(model)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        before = content(model)
        nemo_ext.bake(linked, NEURONS, tmp_path / "out")
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
        assert content(model) == before
        assert_only_rows_are_zero(tensors_in(model / "unet"), tensors_in(tmp_path / "out" / "unet"), NEURONS)

    def test_that_cannot_be_written_can_be_copied_and_changed(self, copied: Path, tmp_path: Path) -> None:
        for file in copied.rglob("*"):
            if file.is_file():
                file.chmod(0o444)
        nemo_ext.bake(copied, NEURONS, tmp_path / "out")
        assert (tmp_path / "out" / "unet" / WEIGHTS).stat().st_mode & stat.S_IWUSR

    def test_of_git_and_of_downloads_are_left_out_and_named(self, copied: Path, tmp_path: Path) -> None:
        for name in (".git", ".cache"):
            (copied / name).mkdir()
            (copied / name / "old-weights").write_bytes(b"the neurons are on")
        baked = nemo_ext.bake(copied, NEURONS, tmp_path / "out")
        assert not {".git", ".cache"} & content(tmp_path / "out").keys()
        assert sorted(note.split()[0] for note in baked.notes) == [str(copied / ".cache"), str(copied / ".git")]


class TestRecord:
    def test_names_neurons_versions_and_the_model(self, model: Path, tmp_path: Path) -> None:
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        record = json.loads((tmp_path / "out" / "nemo_ext.json").read_text())
        assert record["neurons"] == NEURONS.to_dict()
        assert record["versions"]["nemo_ext"] == nemo_ext.__version__
        assert record["model"] == model_fingerprint(load_pipeline(model))
        assert record["results"] == []

    def test_has_scores_of_results_and_no_prompt(self, model: Path, tmp_path: Path) -> None:
        found = localization(PROMPT, NEURONS, model_fingerprint(load_pipeline(model)))
        baked = nemo_ext.bake(model, found, tmp_path / "out")
        (scores,) = json.loads((tmp_path / "out" / "nemo_ext.json").read_text())["results"]
        assert (scores["score_before"], scores["score_after"], scores["threshold"]) == (0.9, 0.1, 0.4)
        assert scores["neurons"] == NEURONS.to_dict()
        assert "only the first denoising step" in baked.card
        assert not any(PROMPT.encode() in (text or b"") for text in content(tmp_path / "out").values())

    def test_has_the_prompts_if_they_are_wanted(self, model: Path, tmp_path: Path) -> None:
        found = localization(PROMPT, NEURONS, model_fingerprint(load_pipeline(model)))
        nemo_ext.bake(model, found, tmp_path / "out", with_prompts=True)
        (scores,) = json.loads((tmp_path / "out" / "nemo_ext.json").read_text())["results"]
        assert scores["prompt"] == PROMPT

    def test_of_an_earlier_bake_is_kept(self, model: Path, tmp_path: Path) -> None:
        first, second = NeuronSet({NEURONS.layers[0]: [0]}), NeuronSet({NEURONS.layers[1]: [1]})
        nemo_ext.bake(model, first, tmp_path / "first")
        nemo_ext.bake(tmp_path / "first", second, tmp_path / "second")
        record = json.loads((tmp_path / "second" / "nemo_ext.json").read_text())
        assert record["neurons"] == second.to_dict()
        assert record["earlier"] == json.loads((tmp_path / "first" / "nemo_ext.json").read_text())
        both = first | second
        assert_only_rows_are_zero(tensors_in(model / "unet"), tensors_in(tmp_path / "second" / "unet"), both)


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("function", ["shutil.copyfile", "nemo_ext.baking.bake.zero_spans", "os.replace"])
    def test_an_interruption_leaves_nothing(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
    ) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr(function, fails)
        with pytest.raises((OSError, KeyboardInterrupt, NemoError)):
            nemo_ext.bake(model, NEURONS, tmp_path / "work" / "out")
        assert list((tmp_path / "work").iterdir()) == []

    def test_nothing_is_left_beside_the_new_folder(self, model: Path, tmp_path: Path) -> None:
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_an_empty_folder_is_filled(self, model: Path, tmp_path: Path) -> None:
        nemo_ext.bake(model, NEURONS, tmp_path)
        assert (tmp_path / "model_index.json").is_file()

    def test_others_can_read_the_new_folder(self, model: Path, tmp_path: Path) -> None:
        nemo_ext.bake(model, NEURONS, tmp_path / "out")
        (tmp_path / "ordinary").mkdir()
        assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "ordinary").st_mode


class TestRefused:
    """Each with one sentence, before anything is written."""

    def refused(self, model: Path, out: Path, *parts: str, neurons: object = NEURONS) -> None:
        before = content(out.parent)
        with pytest.raises(NemoError) as error:
            nemo_ext.bake(model, neurons, out)  # type: ignore[arg-type]
        for part in parts:
            assert part in str(error.value)
        assert content(out.parent) == before

    def test_a_folder_that_is_not_empty(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        self.refused(model, tmp_path / "out", str(tmp_path / "out"), "not an empty folder")

    def test_a_place_in_the_model(self, copied: Path) -> None:
        self.refused(copied, copied / "unet" / "out", "lies in the model's folder")

    def test_a_layer_that_does_not_exist(self, model: Path, tmp_path: Path) -> None:
        self.refused(model, tmp_path / "out", "no value layer 'attn2.to_v'", neurons={"attn2.to_v": [0]})

    def test_a_neuron_that_does_not_exist(self, model: Path, tmp_path: Path) -> None:
        layer = NEURONS.layers[1]
        self.refused(model, tmp_path / "out", layer, "0 to 31", "got 32", neurons={layer: [1, 32]})

    def test_results_of_another_model(self, model: Path, tmp_path: Path) -> None:
        found = localization(PROMPT, NEURONS, "another fingerprint")
        self.refused(model, tmp_path / "out", "another model", str(model), neurons=found)

    @pytest.mark.parametrize("place", ["unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt", "old/unet.BIN"])
    def test_a_pickle_that_can_hold_the_weights(self, copied: Path, tmp_path: Path, place: str) -> None:
        (copied / place).parent.mkdir(exist_ok=True)
        (copied / place).write_bytes(b"never opened")
        self.refused(copied, tmp_path / "out", str(copied / place), "pickle can run code")

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_a_copy_of_the_weights_elsewhere(self, copied: Path, tmp_path: Path, prefix: str) -> None:
        weights = {prefix + name: tensor for name, tensor in tensors_in(copied / "unet").items()}
        safetensors.torch.save_file(weights, copied / "all.safetensors")
        self.refused(copied, tmp_path / "out", str(copied / "all.safetensors"), "another copy")

    def test_a_variant_without_the_layer(self, copied: Path, tmp_path: Path) -> None:
        weights = tensors_in(copied / "unet")
        del weights[f"{NEURONS.layers[1]}.weight"]
        safetensors.torch.save_file(weights, copied / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        self.refused(copied, tmp_path / "out", "model.fp16.safetensors", f"{NEURONS.layers[1]}.weight")

    def test_a_variant_with_nan_in_a_changed_layer(self, copied: Path, tmp_path: Path) -> None:
        weights = tensors_in(copied / "unet")
        weights[f"{NEURONS.layers[1]}.weight"][2, 2] = torch.nan
        safetensors.torch.save_file(weights, copied / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        self.refused(copied, tmp_path / "out", "model.fp16.safetensors", NEURONS.layers[1], "NaN")

    def test_a_link_to_a_folder_that_it_lies_in(self, copied: Path, tmp_path: Path) -> None:
        (copied / "samples" / "loop").symlink_to(copied)
        with pytest.raises(NemoError, match="loop is a link"):
            nemo_ext.bake(copied, NEURONS, tmp_path / "out")

    def test_a_record_that_is_damaged(self, copied: Path, tmp_path: Path) -> None:
        (copied / "nemo_ext.json").write_text("{")
        self.refused(copied, tmp_path / "out", str(copied / "nemo_ext.json"))


def test_results_of_a_search_in_half_precision_are_known(model: Path, tmp_path: Path) -> None:
    searched = load_pipeline(model, dtype=torch.bfloat16)
    found = localization(PROMPT, NEURONS, model_fingerprint(searched))
    assert nemo_ext.bake(model, found, tmp_path / "out").neurons == NEURONS
