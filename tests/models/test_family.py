"""A family that the package has never heard of: one file, and nothing else has to change."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up_family import LAYERS, MEMORIZED, NEURONS, ORDINARY, SignPipeline, Signs, sign_pipeline
from tiny_pipeline import tiny_pipeline

import nemo_ext
from nemo_ext.cli import main
from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import generate_images
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import FAMILIES, family_of, short_layer_name
from nemo_ext.models.stable_diffusion import StableDiffusion
from nemo_ext.results.folder import read_results

SEEDS = 3


@pytest.fixture(autouse=True)
def _signs() -> Iterator[None]:
    """The entry that a new family makes in the registry."""
    FAMILIES.append(Signs())
    yield
    FAMILIES.pop()


@pytest.fixture(scope="module")
def pipe() -> SignPipeline:
    return sign_pipeline()


def test_each_pipeline_has_the_family_that_recognizes_it(pipe: SignPipeline) -> None:
    assert isinstance(family_of(pipe), Signs)
    assert isinstance(family_of(pipe.painter), Signs)
    assert isinstance(family_of(tiny_pipeline()), StableDiffusion)
    with pytest.raises(NemoError, match=r"wanted a diffusers pipeline .*, got int"):
        family_of(3)


def test_its_value_layers_are_found_by_group_and_by_name(pipe: SignPipeline) -> None:
    assert list(value_layers(pipe)) == [LAYERS[1]]
    assert list(value_layers(pipe, "all")) == list(LAYERS)
    assert list(value_layers(pipe, LAYERS[0])) == [LAYERS[0]]
    with pytest.raises(NemoError, match=r"no value layer 'down\+mid'"):
        value_layers(pipe, "down+mid")


def test_its_layers_have_short_names_beside_those_of_other_families() -> None:
    assert short_layer_name(LAYERS[1]) == "line 1"
    assert short_layer_name("mid_block.attentions.0.transformer_blocks.0.attn2.to_v") == "mid"
    assert short_layer_name("elsewhere") == "elsewhere"


@pytest.mark.parametrize("search", ["exhaustive", "grouped"])
def test_its_memorizing_neuron_is_found(pipe: SignPipeline, search: str) -> None:
    statistics = nemo_ext.collect_statistics(pipe, ORDINARY, layers="all")
    threshold = nemo_ext.memorization_threshold(pipe, ORDINARY, seeds=SEEDS)
    found = nemo_ext.localize(pipe, MEMORIZED, statistics=statistics, threshold=threshold, seeds=SEEDS, search=search)
    assert found.memorized
    assert found.neurons == NEURONS
    assert found.certificate is not None
    assert found.certificate.below_threshold
    assert found.certificate.minimal
    assert not nemo_ext.localize(
        pipe, ORDINARY[0], statistics=statistics, threshold=threshold, seeds=SEEDS, search=search
    ).memorized


def test_its_later_lines_are_entered_without_the_earlier_ones(pipe: SignPipeline) -> None:
    statistics = nemo_ext.collect_statistics(pipe, ORDINARY, layers="all")
    found = nemo_ext.localize(pipe, MEMORIZED, statistics=statistics, threshold=0.5, seeds=SEEDS)
    assert found.unet_samples != round(found.unet_samples)


def test_its_neurons_are_switched_off_and_the_images_change(pipe: SignPipeline) -> None:
    def images() -> list[bytes]:
        made = generate_images(pipe, [MEMORIZED] * 2, [1, 2], steps=2, guidance=1.0, batch_size=1)
        return [image.tobytes() for image in made]

    before = images()
    with nemo_ext.patched(pipe, NEURONS):
        assert nemo_ext.memorization_score(pipe, MEMORIZED, seeds=SEEDS).max < 0.5
        after = images()
    assert images() == before
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_the_whole_way_on_the_command_line(pipe: SignPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "ordinary.txt").write_text("\n".join(ORDINARY))
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    ordinary = ["--prompts", str(tmp_path / "ordinary.txt")]
    statistics, threshold = str(tmp_path / "statistics.safetensors"), str(tmp_path / "threshold.json")
    assert main(["stats", *model, *ordinary, "--out", statistics]) == 0
    assert main(["threshold", *model, *ordinary, "--seeds", str(SEEDS), "--out", threshold]) == 0
    search = ["--statistics", statistics, "--threshold", threshold, "--seeds", str(SEEDS)]
    assert main(["localize", *model, "--prompt", MEMORIZED, *search, "--out", str(tmp_path / "results")]) == 0
    assert [found.neurons for found in read_results(tmp_path / "results")] == [NEURONS]
    assert main(["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "report.html")]) == 0
    assert "line 1" in (tmp_path / "report.html").read_text()


def test_a_folder_of_no_family_is_refused_with_all_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    (tmp_path / "ordinary.txt").write_text("\n".join(ORDINARY))
    arguments = ["--model", str(tmp_path), "--prompts", str(tmp_path / "ordinary.txt"), "--device", "cpu"]
    assert main(["stats", *arguments, "--out", str(tmp_path / "statistics.safetensors")]) == 1
    assert "a StableDiffusionPipeline folder (Stable Diffusion 1.x or 2.x) or a SignPipeline folder (Signs)" in (
        capsys.readouterr().err
    )
