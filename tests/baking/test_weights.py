"""Finding the bytes of neurons in safetensors files."""

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from saved_pipeline import assert_only_rows_are_zero
from torch import nn

from nemo_ext import NemoError, NeuronSet
from nemo_ext.baking.weights import plan_folder, zero_spans

LAYER = "mid_block.attn2.to_v"
NEURONS = NeuronSet({LAYER: [0, 2, 5]})
LAYERS = {LAYER: nn.Linear(8, 6)}


def folder_with(folder: Path, **tensors: torch.Tensor) -> Path:
    """A folder with a denoiser of one layer, among other tensors of several formats."""
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    others = {"a": torch.ones(3, dtype=torch.bfloat16), "z": torch.ones(3, 3, dtype=torch.int64)}
    weights = {**others, **{f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}}
    safetensors.torch.save_file(weights, folder / "unet" / "w.safetensors", metadata={"format": "pt", "who": "us"})
    return folder


def numbers_in(file: Path) -> dict[str, torch.Tensor]:
    """The tensors as they are now, in a format that can be compared; `load_file` would read some of them later."""
    return {name: tensor.double() for name, tensor in safetensors.torch.load(file.read_bytes()).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rows_and_elements_of_the_bias_become_zero_in_every_format(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = folder_with(tmp_path, weight=torch.randn(6, 8).add(9).to(dtype), bias=torch.ones(6).to(dtype))
    file = folder / "unet" / "w.safetensors"
    before = numbers_in(file)
    zero_spans(file, plan_folder(folder, "unet", LAYERS, NEURONS).spans[Path("unet/w.safetensors")])
    assert_only_rows_are_zero(before, numbers_in(file), NEURONS)


def test_the_metadata_is_kept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, weight=torch.ones(6, 8))
    file = folder / "unet" / "w.safetensors"
    zero_spans(file, plan_folder(folder, "unet", LAYERS, NEURONS).spans[Path("unet/w.safetensors")])
    with safetensors.safe_open(file, framework="pt") as weights:
        assert weights.metadata() == {"format": "pt", "who": "us"}


@pytest.mark.parametrize("weight", [torch.ones(6, 9), torch.ones(48), torch.ones(6, 8, dtype=torch.int8)])
def test_another_shape_or_kind_of_numbers_is_refused(tmp_path: Path, weight: torch.Tensor) -> None:
    with pytest.raises(NemoError, match=r"w\.safetensors: mid_block.*weight must have shape \(6, 8\)"):
        plan_folder(folder_with(tmp_path, weight=weight), "unet", LAYERS, NEURONS)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, weight=torch.ones(6, 8))
    file = folder / "unet" / "w.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(NemoError, match=r"w\.safetensors can't be read as safetensors"):
        plan_folder(folder, "unet", LAYERS, NEURONS)
