"""Which files of a saved pipeline are read."""

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.models.loading import load_pipeline


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_folder_with_one_variant_alone_is_read(
    variant: str, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    saved = tiny_pipeline().to(dtype)
    saved.save_pretrained(tmp_path, variant=variant, max_shard_size="200KB" if sharded else "5GB")
    pipe = load_pipeline(tmp_path)
    assert torch.equal(pipe.unet.conv_in.weight, saved.unet.conv_in.weight.float())
    assert torch.equal(
        pipe.text_encoder.get_input_embeddings().weight, saved.text_encoder.get_input_embeddings().weight.float()
    )


def test_of_several_variants_the_one_with_most_digits_is_read(tmp_path: Path) -> None:
    for variant, dtype, factor in (("bf16", torch.bfloat16, 2), ("fp16", torch.float16, 3), (None, torch.float32, 1)):
        pipe = tiny_pipeline().to(dtype)
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(factor)
        pipe.save_pretrained(tmp_path, variant=variant)
    wanted = tiny_pipeline().unet.conv_in.weight
    assert torch.equal(load_pipeline(tmp_path).unet.conv_in.weight, wanted)
    for file in tmp_path.rglob("*.safetensors"):
        if file.name.count(".") == 1:
            file.unlink()
    torch.testing.assert_close(load_pipeline(tmp_path).unet.conv_in.weight, 3 * wanted, rtol=1e-2, atol=1e-2)


def test_components_without_a_common_variant_are_refused(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(NemoError, match="some components only in one variant"):
        load_pipeline(tmp_path)


def test_a_description_that_nests_too_deeply_is_refused_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(NemoError, match=r"model_index\.json can't be read as JSON"):
        load_pipeline(tmp_path)
