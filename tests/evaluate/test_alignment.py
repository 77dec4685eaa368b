"""The fit of an image and its prompt, with a small CLIP model of random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_parts import noise_image
from tiny_pipeline import TOKENS, tiny_tokenizer
from transformers import CLIPConfig, CLIPModel

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.alignment import PromptAlignment

PROMPT = "a zebra on ice"
PROCESSOR = """{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
"crop_size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **{"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS},
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    torch.manual_seed(4)
    config = CLIPConfig(
        text_config={**small, **text}, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(PROCESSOR)
    return path


def test_it_is_the_cosine_of_clips_features(folder: Path) -> None:
    images = [noise_image(seed, (16, 16)) for seed in range(3)]
    model = CLIPModel.from_pretrained(folder)
    tokens = tiny_tokenizer()([PROMPT], return_tensors="pt")
    plain = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    pixels = (plain / 255 - 0.5) / 0.25
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    wanted = (output.logits_per_image[:, 0] / model.logit_scale.exp()).tolist()
    assert PromptAlignment(folder).measure(PROMPT, images) == pytest.approx(wanted, abs=1e-5)


def test_a_prompt_that_is_too_long_is_cut(folder: Path) -> None:
    clip, images = PromptAlignment(folder), [noise_image(1)]
    long = "abc" * 40
    assert clip.measure(long, images) == clip.measure(f"{long}z", images)


def test_a_folder_without_a_model_says_where_one_is_had(tmp_path: Path) -> None:
    with pytest.raises(NemoError, match=r"has no config\.json: wanted the folder of a CLIP model"):
        PromptAlignment(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(NemoError, match="can't be loaded"):
        PromptAlignment(tmp_path)


def test_features_that_are_not_finite_are_an_error(folder: Path) -> None:
    clip = PromptAlignment(folder)
    with torch.no_grad():
        clip._model.visual_projection.weight[0] = torch.nan
    with pytest.raises(NemoError, match="not finite"):
        clip.measure(PROMPT, [noise_image(1)])
