"""The score of a prompt: the similarity of its seeds' noise differences."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import Planted, planted_pipeline, tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling, sample_images, sampler_of
from nemo_ext.measure.image_similarity import PixelSimilarity
from nemo_ext.measure.noise import initial_latents, noise_differences
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import memorization_score, pairwise_score
from nemo_ext.measure.similarity import similarity
from nemo_ext.models.text import encode_prompts
from nemo_ext.patching.patch import patched

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


class TestMemorizationScore:
    def test_of_a_seed_is_its_highest_similarity_with_another(self, pipe: StableDiffusionPipeline) -> None:
        score = memorization_score(pipe, "a cat", seeds=4)
        difference = noise_differences(pipe, encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 4, PAPER), PAPER)
        for s in range(4):
            others = [similarity(difference[[s]], difference[[r]], PAPER).item() for r in range(4) if r != s]
            assert score.per_seed[s] == pytest.approx(max(others), abs=1e-5)
        assert score.max == max(score.per_seed)
        assert torch.equal(score.pairs, score.pairs.T)
        assert torch.equal(score.pairs.diagonal(), torch.ones(4, dtype=torch.float64))

    def test_is_high_for_the_memorized_prompt_alone(self, planted: Planted) -> None:
        assert memorization_score(planted.pipe, planted.memorized_prompt, seeds=3).max > 0.9
        assert memorization_score(planted.pipe, planted.ordinary_prompts[0], seeds=3).max < 0.3

    def test_measures_a_patched_pipeline_as_it_is(self, planted: Planted) -> None:
        with patched(planted.pipe, planted.neurons):
            assert memorization_score(planted.pipe, planted.memorized_prompt, seeds=3).max < 0.3

    def test_of_seeds_that_are_all_the_same_is_refused(self) -> None:
        same = torch.rand(1, 4, 16, 16).expand(3, -1, -1, -1)
        with pytest.raises(NemoError, match="all seeds have exactly the same noise difference"):
            pairwise_score(same, Protocol.paper())

    def test_wants_two_seeds(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="a score compares seeds: wanted 2 or more, got 1"):
            memorization_score(pipe, "a cat", seeds=1)


class TestImages:
    SAMPLING = Sampling(seeds=3, steps=2, guidance=1.0)

    def test_are_compared_pair_by_pair(self, pipe: StableDiffusionPipeline) -> None:
        score = memorization_score(pipe, "a red cat", images=True, sampling=self.SAMPLING)
        images = sample_images(sampler_of(pipe), "a red cat", self.SAMPLING, (1, 2, 3), batch_size=3)
        described = PixelSimilarity().describe(images)
        expected = PixelSimilarity().between(described, described)
        torch.testing.assert_close(score.pairs, expected.fill_diagonal_(1.0))

    def test_of_a_memorized_prompt_are_more_alike(self) -> None:
        """Found by images, where the first step is not asked."""
        pipe = planted_pipeline()
        memorized, ordinary = (
            memorization_score(pipe.pipe, prompt, images=True, sampling=self.SAMPLING).max
            for prompt in (pipe.memorized_prompt, pipe.ordinary_prompts[0])
        )
        assert memorized > ordinary
