"""A saved pipeline with files that diffusers does not know, and what tests ask about the weights in such folders."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from nemo_ext.neurons import NeuronSet

#: Neurons in a down block, the mid block and an up block of `save_tiny_pipeline`, the first and last rows among them.
NEURONS = NeuronSet(
    {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v": [0, 3],
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [31],
        "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_v": [5, 6, 15],
    }
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_tiny_pipeline(folder: Path) -> Path:
    """Save a pipeline with value layers in all blocks, among other files, and return the folder."""
    tiny_pipeline(text_in_up_blocks=True).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    (folder / "samples" / "empty").mkdir(parents=True)
    (folder / "samples" / "notes.xyz").write_bytes(bytes(range(256)))
    (folder / "unet" / "notes.txt").write_text("kept")
    # A component that is not used here can be a pickle; nothing of the denoiser is in it.
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"never opened")
    return folder


def tensors_in(folder: Path, pattern: str = "*.safetensors") -> dict[str, Tensor]:
    """All tensors in the files of a folder that match a pattern."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        found |= safetensors.torch.load_file(file)
    return found


def assert_only_rows_are_zero(before: Mapping[str, Tensor], after: Mapping[str, Tensor], neurons: NeuronSet) -> None:
    """The rows of the neurons, and their elements of a bias, are zero, and everything else has the same bits."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.clone()
        layer, _, part = name.rpartition(".")
        if layer in neurons and part in ("weight", "bias"):
            expected[list(neurons[layer])] = 0
            assert tensor[list(neurons[layer])].abs().max() > 0
        assert after[name].dtype == expected.dtype
        assert after[name].equal(expected), name


def content(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> content of each file, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
