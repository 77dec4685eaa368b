"""The text that is measured is the text that the pipeline generates from."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import TOKENS, tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import prompt_activations
from nemo_ext.measure.score import memorization_score
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.state import model_fingerprint
from nemo_ext.models.text import encode_prompts, skip_text_layers

SEEDS = 3


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def theirs(pipe: StableDiffusionPipeline, text: str, **arguments: object) -> torch.Tensor:
    """The embedding of the pipeline's own encoding."""
    with torch.no_grad():
        return pipe.encode_prompt(text, "cpu", 1, False, **arguments)[0]


class TestTextualInversion:
    @pytest.mark.parametrize("vectors", [1, 3])
    def test_its_name_stands_for_all_of_its_vectors(self, pipe: StableDiffusionPipeline, vectors: int) -> None:
        pipe.load_textual_inversion({"<toy>": torch.randn(vectors, pipe.text_encoder.config.hidden_size)})
        assert torch.equal(encode_prompts(pipe, ["a <toy>"]).hidden, theirs(pipe, "a <toy>"))

    def test_its_name_and_its_tokens_written_out_have_one_score_and_one_activation(
        self, pipe: StableDiffusionPipeline
    ) -> None:
        pipe.load_textual_inversion({"<toy>": torch.randn(3, pipe.text_encoder.config.hidden_size)})
        texts = ["a <toy>", "a <toy> <toy>_1 <toy>_2"]
        first, second = (memorization_score(pipe, text, seeds=SEEDS).pairs for text in texts)
        assert torch.equal(first, second)
        for activation in prompt_activations(pipe, texts).values():
            assert torch.equal(activation[0], activation[1])


class TestTokenizerWithoutALength:
    def test_is_as_long_as_the_text_encoder_has_positions(self, pipe: StableDiffusionPipeline) -> None:
        wanted = encode_prompts(pipe, ["a cat"]).hidden
        pipe.tokenizer.model_max_length = int(1e30)
        assert torch.equal(encode_prompts(pipe, ["a cat"]).hidden, wanted)
        with pytest.warns(UserWarning, match=f"cut to {TOKENS} tokens"):
            encode_prompts(pipe, ["a" * (2 * TOKENS)])

    def test_generates_after_loading(self, pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
        pipe.tokenizer.model_max_length = int(1e30)
        pipe.save_pretrained(tmp_path)
        loaded = load_pipeline(tmp_path)
        assert loaded.tokenizer.model_max_length == TOKENS
        loaded("a cat", num_inference_steps=1, output_type="latent")


class TestClipSkip:
    def test_is_that_of_diffusers(self, tmp_path: Path) -> None:
        pipe = tiny_pipeline()
        # Where diffusers looks for the last normalization, which newer versions of transformers have moved.
        if not hasattr(pipe.text_encoder, "text_model"):
            vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
        wanted = theirs(pipe, "a cat", clip_skip=1)
        pipe.save_pretrained(tmp_path)
        loaded = load_pipeline(tmp_path, clip_skip=1)
        assert torch.allclose(encode_prompts(loaded, ["a cat"]).hidden, wanted, atol=1e-6)
        assert not torch.allclose(encode_prompts(pipe, ["a cat"]).hidden, wanted, atol=1e-3)

    def test_is_part_of_what_the_fingerprint_is_of(self, pipe: StableDiffusionPipeline) -> None:
        before = model_fingerprint(pipe)
        skip_text_layers(pipe, 0)
        assert model_fingerprint(pipe) == before
        skip_text_layers(pipe, 1)
        assert model_fingerprint(pipe) != before

    @pytest.mark.parametrize("count", [-1, 2, 12])
    def test_of_more_layers_than_there_are_is_refused(self, pipe: StableDiffusionPipeline, count: int) -> None:
        with pytest.raises(NemoError, match=rf"from 0 to 1, because text_encoder has 2 layers, got {count}"):
            skip_text_layers(pipe, count)

    def test_of_another_kind_of_text_encoder_is_refused(self, pipe: StableDiffusionPipeline) -> None:
        pipe.text_encoder = torch.nn.Linear(2, 2)
        with pytest.raises(NemoError, match="text_encoder is a Linear, of which no layers can be skipped"):
            skip_text_layers(pipe, 1)
