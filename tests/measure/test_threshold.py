"""The threshold τ: what it is computed from, and what it can be compared with."""

import dataclasses
from pathlib import Path

import numpy
import pytest
from diffusers import StableDiffusionPipeline
from tiny_pipeline import tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.threshold import Threshold, memorization_threshold

PROMPTS = ("a red cat", "a blue dog", "one boat")
PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def threshold(pipe: StableDiffusionPipeline) -> Threshold:
    return memorization_threshold(pipe, PROMPTS, seeds=3)


class TestThreshold:
    def test_is_the_mean_plus_one_unbiased_std_of_the_scores(
        self, pipe: StableDiffusionPipeline, threshold: Threshold
    ) -> None:
        scores = [memorization_score(pipe, prompt, seeds=3).max for prompt in PROMPTS]
        assert threshold.scores == tuple(scores)
        assert float(threshold) == pytest.approx(numpy.mean(scores) + numpy.std(scores, ddof=1))
        assert (threshold.seeds, threshold.protocol) == (3, PAPER)

    def test_published_code_measures_it_with_guidance(self, pipe: StableDiffusionPipeline) -> None:
        guided = memorization_threshold(pipe, PROMPTS, seeds=3, protocol=PUBLISHED)
        without = dataclasses.replace(PUBLISHED, threshold_guidance=0.0)
        assert guided.scores != memorization_threshold(pipe, PROMPTS, seeds=3, protocol=without).scores

    def test_wants_two_prompts(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="needs two prompts or more, got 1"):
            memorization_threshold(pipe, ["a cat"])

    def test_round_trip(self, tmp_path: Path, threshold: Threshold) -> None:
        threshold.save(tmp_path / "threshold.json")
        assert Threshold.load(tmp_path / "threshold.json") == threshold
        assert [file.name for file in tmp_path.iterdir()] == ["threshold.json"]

    @pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"protocol": {}, "scores": []}'])
    def test_other_files_are_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(NemoError, match=r"t\.json does not hold a threshold"):
            Threshold.load(tmp_path / "t.json")

    def test_holds_for_its_model_protocol_and_number_of_seeds_only(
        self, pipe: StableDiffusionPipeline, threshold: Threshold
    ) -> None:
        threshold.check(pipe, dataclasses.replace(PAPER, first_seed=9, first_theta=4.0), seeds=3)
        with pytest.raises(NemoError, match="measured with seeds 3, got 10"):
            threshold.check(pipe, PAPER, seeds=10)
        with pytest.raises(NemoError, match="measured with step_index 0, got 1"):
            threshold.check(pipe, PUBLISHED, seeds=3)
        with pytest.raises(NemoError, match="measured on another model"):
            threshold.check(tiny_pipeline(seed=1), PAPER, seeds=3)


class TestImageThreshold:
    SAMPLING = Sampling(seeds=2, steps=2, guidance=1.0)

    @pytest.fixture(scope="class")
    @classmethod
    def threshold(cls, pipe: StableDiffusionPipeline) -> Threshold:
        return memorization_threshold(pipe, PROMPTS, seeds=3, sampling=cls.SAMPLING, image_prompts=2)

    def test_is_the_mean_plus_one_std_of_the_image_scores_of_the_first_prompts(
        self, pipe: StableDiffusionPipeline, threshold: Threshold
    ) -> None:
        scores = [memorization_score(pipe, prompt, images=True, sampling=self.SAMPLING).max for prompt in PROMPTS[:2]]
        assert threshold.images is not None
        assert threshold.images.scores == pytest.approx(scores)
        assert threshold.images.value == pytest.approx(numpy.mean(scores) + numpy.std(scores, ddof=1))

    def test_round_trip(self, tmp_path: Path, threshold: Threshold) -> None:
        threshold.save(tmp_path / "threshold.json")
        assert Threshold.load(tmp_path / "threshold.json") == threshold

    def test_of_one_prompt_is_refused(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="image_prompts must be 2 or more"):
            memorization_threshold(pipe, PROMPTS, seeds=3, sampling=self.SAMPLING, image_prompts=1)
