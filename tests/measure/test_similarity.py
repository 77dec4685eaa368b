"""Similarity against the plain formula in float64."""

import numpy
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity, similarity_scales

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


def plain_ssim(a: numpy.ndarray, b: numpy.ndarray, data_range: float) -> tuple[float, float]:
    """Wang et al. 2004 in float64, window after window: SSIM and its contrast-structure part."""
    offsets = numpy.arange(-5, 6)
    line = numpy.exp(-(offsets**2) / (2 * 1.5**2))
    window = numpy.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    ssim, contrast = [], []
    for channel_a, channel_b in zip(a, b, strict=True):
        for row in range(a.shape[1] - 10):
            for column in range(a.shape[2] - 10):
                x = channel_a[row : row + 11, column : column + 11]
                y = channel_b[row : row + 11, column : column + 11]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                contrast.append((2 * cov + c2) / (vx + vy + c2))
                ssim.append(contrast[-1] * (2 * mx * my + c1) / (mx**2 + my**2 + c1))
    return float(numpy.mean(ssim)), float(numpy.mean(contrast))


def halved(a: numpy.ndarray) -> numpy.ndarray:
    """Means of 2×2 blocks; an odd last row or column is dropped."""
    rows, columns = a.shape[1] // 2 * 2, a.shape[2] // 2 * 2
    return a[:, :rows, :columns].reshape(a.shape[0], rows // 2, 2, columns // 2, 2).mean(axis=(2, 4))


def plain_similarity(a: numpy.ndarray, b: numpy.ndarray, scales: int, data_range: float) -> float:
    """The design's multi-scale similarity of one pair, in float64."""
    if scales == 1:
        return plain_ssim(a, b, data_range)[0]
    product, weight = 1.0, 0.33 if scales == 3 else 1 / scales
    for scale in range(scales):
        ssim, contrast = plain_ssim(a, b, data_range)
        product *= max(ssim if scale == scales - 1 else contrast, 0.0) ** weight
        a, b = halved(a), halved(b)
    return product


def alike(height: int, width: int, pairs: int = 3) -> tuple[Tensor, Tensor]:
    """Maps in [0, 1] that share more and more from pair to pair."""
    share = torch.linspace(0.2, 0.95, pairs).reshape(-1, 1, 1, 1)
    common = torch.rand(pairs, 2, height, width)
    return (share * common + (1 - share) * torch.rand_like(common) for _ in range(2))


class TestSimilarity:
    @pytest.mark.parametrize(
        ("size", "scales"), [(11, 1), (16, 1), (21, 1), (22, 2), (32, 2), (43, 2), (44, 3), (64, 3), (128, 3)]
    )
    def test_has_as_many_scales_as_the_window_fits(self, size: int, scales: int) -> None:
        assert similarity_scales(size, size) == scales
        assert similarity_scales(size, 128) == similarity_scales(128, size) == scales

    def test_latents_smaller_than_the_window_are_refused(self) -> None:
        with pytest.raises(NemoError, match=r"latents of 10x64 are smaller than the similarity's window of 11x11"):
            similarity_scales(10, 64)
        assert similarity_scales(10, 64, window_sigma=1.0) == 1

    @pytest.mark.parametrize(("height", "width", "scales"), [(16, 17, 1), (23, 32, 2), (45, 47, 3)])
    def test_is_the_plain_formula_in_float64(self, height: int, width: int, scales: int) -> None:
        a, b = alike(height, width)
        expected = [
            plain_similarity(x, y, scales, 1.0) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
        numpy.testing.assert_allclose(similarity(a, b, PAPER), expected, rtol=1e-4, atol=1e-5)

    def test_one_scale_is_torchmetrics_without_its_border(self) -> None:
        a, b = alike(16, 16)
        _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
        inner = full[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
        torch.testing.assert_close(similarity(a, b, PAPER), inner, rtol=1e-4, atol=1e-5)

    def test_of_equal_maps_is_1(self) -> None:
        for size in (16, 32, 64):
            a = torch.rand(2, 4, size, size)
            torch.testing.assert_close(similarity(a, a, PAPER), torch.ones(2))
            torch.testing.assert_close(similarity(a, a, PUBLISHED), torch.ones(2))
            constant = torch.zeros(1, 1, size, size)
            assert similarity(constant, constant, PUBLISHED).item() == 1

    def test_paper_a_pair_does_not_depend_on_the_others(self) -> None:
        a, b = alike(64, 64)
        torch.testing.assert_close(similarity(a, b, PAPER)[1:2], similarity(a[1:2], b[1:2], PAPER))

    def test_published_code_infers_the_range_from_all_pairs_at_every_scale(self) -> None:
        a, b = alike(64, 64)
        together, alone = similarity(a, b, PUBLISHED)[1], similarity(a[1:2], b[1:2], PUBLISHED)[0]
        assert (together - alone).abs() > 1e-5
        expected, weight = torch.ones(3, dtype=torch.float64), 0.33
        x, y = a, b
        for scale in range(3):
            data_range = max((x.max() - x.min()).item(), (y.max() - y.min()).item())
            terms = [plain_ssim(p, q, data_range) for p, q in zip(x.double().numpy(), y.double().numpy(), strict=True)]
            expected *= torch.tensor([ssim if scale == 2 else contrast for ssim, contrast in terms]) ** weight
            x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
        # At the coarsest scale the first pair has 0.015, of which rounding by 5e-6 is 3e-4.
        numpy.testing.assert_allclose(similarity(a, b, PUBLISHED), expected, rtol=1e-3, atol=1e-5)
