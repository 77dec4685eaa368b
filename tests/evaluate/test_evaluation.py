"""The whole evaluation, on a pipeline with planted neurons."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_parts import ColourSimilarity, noise_image
from PIL import Image
from tiny_pipeline import Planted, tiny_pipeline
from torch import Tensor

import nemo_ext.evaluate
from nemo_ext.errors import NemoError
from nemo_ext.evaluate.alignment import PromptAlignment
from nemo_ext.evaluate.evaluation import _apart, evaluate_results
from nemo_ext.evaluate.quality import FeatureNetwork, distances
from nemo_ext.evaluate.table import Evaluation
from nemo_ext.measure.generation import Sampling, generate_images, sampler_of
from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.measure.originals import Originals
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import Localization

SAMPLING = Sampling(seeds=3, steps=1, guidance=1.0)


def mean_colours(pixels: Tensor) -> Tensor:
    return pixels.double().mean((2, 3))


class Length(PromptAlignment):
    """A stand-in for CLIP: the length of the prompt."""

    def __init__(self) -> None:
        self.name = "length"

    def measure(self, prompt: str, images: Sequence[Image.Image]) -> tuple[float, ...]:
        return (float(len(prompt)),) * len(images)


#: A stand-in for Inception.
NETWORK = FeatureNetwork("F", "K", "stand-in", 8, mean_colours)


@pytest.fixture(scope="module")
def original(planted: Planted) -> Image.Image:
    """What the untouched model generates for the memorized prompt with seed 1."""
    (image,) = generate_images(
        sampler_of(planted.pipe), [planted.memorized_prompt], [1], steps=1, guidance=1.0, batch_size=1
    )
    return image


@pytest.fixture(scope="module")
def originals(planted: Planted, original: Image.Image) -> Originals:
    prompt = planted.memorized_prompt
    return Originals({prompt: (original,), "elsewhere": (noise_image(1),)}, {prompt: "VM"})


def test_the_function_is_found_in_the_package() -> None:
    assert nemo_ext.evaluate.evaluate_results is evaluate_results


@pytest.fixture(scope="module")
def evaluation(planted: Planted, results: list[Localization], originals: Originals) -> Evaluation:
    return evaluate_results(
        planted.pipe,
        results,
        originals=originals,
        similarity=ColourSimilarity(),
        sampling=SAMPLING,
        draws=2,
        ordinary=planted.ordinary_prompts[1:5],
        inception=NETWORK,
        clip=Length(),
    )


class TestMeasures:
    def test_every_memorized_prompt_is_evaluated_at_every_stage(self, evaluation: Evaluation, planted: Planted) -> None:
        assert [one.index for one in evaluation.prompts] == [0, 2]
        assert evaluation.not_memorized == 1
        for one in evaluation.prompts:
            assert one.before.neurons == 0
            assert one.after.neurons == len(planted.neurons)
            assert [control.neurons for control in one.controls] == [len(planted.neurons)] * 2
            assert one.before.same_seed is None
            assert one.after.same_seed is not None

    def test_only_the_found_neurons_change_the_images(self, evaluation: Evaluation) -> None:
        first = evaluation.prompts[0]
        assert first.before.originals is not None
        assert first.after.originals is not None
        assert first.before.originals.similarity[0] == pytest.approx(1)
        assert first.after.originals.similarity[0] < 0.999
        assert first.after.same_seed is not None
        assert all(
            control.same_seed is not None and min(control.same_seed) > max(first.after.same_seed)
            for control in first.controls
        )

    def test_labels_and_originals_belong_to_their_prompts(self, evaluation: Evaluation) -> None:
        assert [one.label for one in evaluation.prompts] == ["VM", None]
        assert evaluation.prompts[1].before.originals is None

    def test_ordinary_prompts_have_distances_to_the_untouched_model(
        self, evaluation: Evaluation, planted: Planted
    ) -> None:
        ordinary = evaluation.ordinary
        assert ordinary is not None
        assert ordinary.distance_after is not None
        assert (ordinary.prompts, ordinary.neurons, ordinary.frechet) == (4, len(planted.neurons), "F")
        assert (ordinary.distance_after.images, ordinary.distance_after.features) == (4, 3)
        # An ordinary prompt's images do not depend on the planted neurons.
        assert min(ordinary.same_seed_after) > 0.99

    def test_alignment_is_measured_with_each_images_prompt(self, evaluation: Evaluation, planted: Planted) -> None:
        assert evaluation.prompts[1].after.alignment == (len("zoo zebra"),) * 3
        assert evaluation.ordinary is not None
        assert evaluation.ordinary.alignment_after == tuple(map(len, planted.ordinary_prompts[1:5]))

    def test_what_is_missing_has_a_reason(self, evaluation: Evaluation) -> None:
        assert {"SSCD", "FID"} <= set(evaluation.omitted)
        assert "CLIP alignment" not in evaluation.omitted
        assert "colours takes its place" in evaluation.omitted["SSCD"]

    def test_the_pipeline_is_untouched_afterwards(self, evaluation: Evaluation, planted: Planted) -> None:
        assert not is_patched(planted.pipe)


def test_distances_are_taken_to_the_images_before() -> None:
    before, after, control = torch.randn(3, 8, 2, dtype=torch.float64)
    found = _apart({"before": [before[:5], before[5:]], "after": [after], "control-1": [control]})
    assert found == {"after": distances(before, after), "control-1": distances(before, control)}


def test_without_ordinary_prompts_originals_and_draws_the_rest_is_measured(
    planted: Planted, results: list[Localization], similarity: ImageSimilarity
) -> None:
    found = evaluate_results(planted.pipe, results[:1], similarity=similarity, sampling=SAMPLING, draws=0)
    assert found.ordinary is None
    assert found.prompts[0].controls == ()
    assert [measure.name for measure in found.measures] == ["neurons off", "colours_gen", "colours between seeds"]
    assert "none were given" in found.omitted["colours_orig"]


class TestFolder:
    def test_images_and_the_original_are_written_under_the_results_names(
        self,
        planted: Planted,
        results: list[Localization],
        originals: Originals,
        similarity: ImageSimilarity,
        original: Image.Image,
        tmp_path: Path,
    ) -> None:
        evaluate_results(
            planted.pipe,
            results,
            originals=originals,
            similarity=similarity,
            sampling=SAMPLING,
            draws=1,
            ordinary=planted.ordinary_prompts[1:3],
            inception=NETWORK,
            folder=tmp_path,
        )
        folder = ResultsFolder(tmp_path)
        files = {file.name for file in folder.evaluated_folder(0, results[0].prompt).iterdir()}
        stages = [f"{stage}-{seed}.png" for stage in ("before", "after", "control-1") for seed in (1, 2, 3)]
        assert files == {"images.json", *stages}
        with Image.open(folder.images_folder(0, results[0].prompt) / "original.png") as written:
            assert written.tobytes() == original.tobytes()
        assert not (folder.images_folder(2, results[2].prompt) / "original.png").exists()
        for index, prompt in enumerate(planted.ordinary_prompts[1:3]):
            # Each ordinary prompt has a seed of its own.
            names = {file.name for file in folder.ordinary_folder(index, prompt).iterdir()}
            assert names == {"images.json", *(f"{at}-{index + 1}.png" for at in ("before", "after", "control-1"))}

    def test_a_second_run_generates_nothing_and_measures_the_same(
        self, planted: Planted, results: list[Localization], similarity: ImageSimilarity, tmp_path: Path
    ) -> None:
        first, second = (
            evaluate_results(planted.pipe, results, similarity=similarity, sampling=SAMPLING, draws=1, folder=tmp_path)
            for _ in range(2)
        )
        assert (first.reused_images, second.reused_images) == (0, 18)
        assert replace(second, seconds=first.seconds, reused_images=0) == first


class TestBadInput:
    """One sentence, before an image is generated."""

    def test_results_of_another_model(
        self, results: list[Localization], similarity: ImageSimilarity, tmp_path: Path
    ) -> None:
        with pytest.raises(NemoError, match="the results belong to another model"):
            evaluate_results(tiny_pipeline(7), results, similarity=similarity, sampling=SAMPLING, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_memorized(self, planted: Planted, results: list[Localization]) -> None:
        with pytest.raises(NemoError, match="none of the 1 results is memorized"):
            evaluate_results(planted.pipe, results[1:2])

    def test_originals_of_other_prompts(self, planted: Planted, results: list[Localization]) -> None:
        with pytest.raises(NemoError, match="none of the 1 prompts with originals is among the 2 memorized prompts"):
            evaluate_results(planted.pipe, results, originals=Originals({"elsewhere": (noise_image(1),)}))

    def test_an_ordinary_prompt_that_is_memorized(self, planted: Planted, results: list[Localization]) -> None:
        with pytest.raises(NemoError, match="'zoo zebra' is a memorized prompt of the results and an ordinary prompt"):
            evaluate_results(planted.pipe, results, ordinary=["one", "zoo zebra"])

    def test_nan_in_images(
        self, planted: Planted, results: list[Localization], similarity: ImageSimilarity, tmp_path: Path
    ) -> None:
        pipe = copy.deepcopy(planted.pipe)
        with torch.no_grad():
            pipe.vae.decoder.conv_out.bias[0] = torch.nan
        results = [replace(found, model=model_fingerprint(pipe)) for found in results]
        with pytest.raises(NemoError, match="the images hold NaN"):
            evaluate_results(pipe, results, similarity=similarity, sampling=SAMPLING, folder=tmp_path)
        assert not list(tmp_path.rglob("*.png"))

    def test_neurons_that_the_model_does_not_have(
        self, planted: Planted, results: list[Localization], similarity: ImageSimilarity
    ) -> None:
        wrong = replace(results[0], neurons=NeuronSet({results[0].layers[0]: [99]}))
        with pytest.raises(NemoError, match="has neurons 0 to 15, got 99"):
            evaluate_results(planted.pipe, [wrong], similarity=similarity, sampling=SAMPLING)
