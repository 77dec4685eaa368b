"""Alignment: how well an image fits its prompt, by CLIP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Where the folder is had, for messages.
WHERE_FROM = (
    "the folder of a CLIP model with safetensors, such as openai/clip-vit-base-patch32 (ViT-B/32, which the published "
    "scripts use), as transformers' save_pretrained writes it"
)
_BATCH = 16


class PromptAlignment:
    """The cosine of CLIP's image and text features (Radford et al., arXiv 2103.00020).

    Prompts are cut after the number of tokens that CLIP reads, 77 in OpenAI's models.

    Args:
        folder: a local folder with the model, its tokenizer and its image processor. Only safetensors are read, and
            nothing is downloaded.

    Raises:
        NemoError: the folder does not exist, or has no CLIP model that can be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import transformers

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise NemoError(f"{path} is not a CLIP model, it has no config.json: wanted {WHERE_FROM}")
        # The processor that uses Pillow has a name of its own only in newer versions of transformers. The other one
        # needs torchvision.
        name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        processor: Any = getattr(transformers, name)
        try:
            model = transformers.CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self._model: Any = model.eval()
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._processor: Any = processor.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers raises anything from KeyError to SafetensorError
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise NemoError(f"the CLIP model in {path} can't be loaded ({reason}): wanted {WHERE_FROM}") from error
        self.name = f"CLIP ({path.name})"

    def measure(self, prompt: str, images: Sequence[Image]) -> tuple[float, ...]:
        """The cosine between the features of a prompt and of each image, from -1 to 1.

        Raises:
            NemoError: CLIP's features are not finite.
        """
        with torch.no_grad():
            tokens = self._tokenizer(
                [prompt],
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            text = _features(self._model.get_text_features(**tokens))
            pictures = []
            for start in range(0, len(images), _BATCH):
                batch = [image.convert("RGB") for image in images[start : start + _BATCH]]
                pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
                pictures.append(_features(self._model.get_image_features(pixel_values=pixels)))
            values = torch.nn.functional.cosine_similarity(torch.cat(pictures).double(), text.double())
        if not bool(values.isfinite().all()):
            raise NemoError(f"the features of {self.name} are not finite: get an undamaged copy, {WHERE_FROM}")
        return tuple(values.tolist())


def _features(output: Any) -> torch.Tensor:
    """The features in CLIP's output, [B, D]: transformers 5 wraps them in an object."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features
