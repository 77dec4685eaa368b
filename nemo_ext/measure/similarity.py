"""Structural similarity of noise differences (docs/method.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol


def similarity_scales(height: int, width: int, window_sigma: float = 1.5) -> int:
    """M ≤ 3, the number of scales that the similarity has on maps of a size (docs/method.md, section 4).

    The largest with ⌊size / 2^(M−1)⌋ at least as wide as the window: 3 from 44 pixels on, 2 from
    22, 1 from 11 (for an 11-wide window).

    Raises:
        NemoError: the window does not fit at all.
    """
    window = _window_width(window_sigma)
    scales = [m for m in (1, 2, 3) if min(height, width) // 2 ** (m - 1) >= window]
    if not scales:
        raise NemoError(
            f"latents of {height}x{width} are smaller than the similarity's window of {window}x{window}: "
            "choose a smaller Protocol.window_sigma"
        )
    return scales[-1]


def similarity(a: Tensor, b: Tensor, protocol: Protocol) -> Tensor:
    """Structural similarity of pairs of maps: MS-SSIM with `similarity_scales` scales, SSIM for one.

    Weights are 0.33 each for three scales, else 1/M; K1 = 0.01, K2 = 0.03; negative factors count
    as 0 where there are several scales. Only whole windows count (the border is left out), which is
    what torchmetrics did up to 1.3, the version behind the published numbers, and later ones no
    longer do.

    Args:
        a, b: [P, C, H, W] float32, in [0, 1].
        protocol: `data_range` and `window_sigma`. An inferred range is the largest of a's and b's
            over all P pairs, at every scale.

    Returns:
        [P] float32: 1 for equal maps. Deterministic on the CPU.
    """
    scales = similarity_scales(a.shape[-2], a.shape[-1], protocol.window_sigma)
    window = _gaussian_window(protocol.window_sigma, a)
    if scales == 1:
        return _ssim_terms(a, b, window, protocol.data_range)[0]
    weight = 0.33 if scales == 3 else 1 / scales
    product = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for scale in range(scales):
        ssim, contrast = _ssim_terms(a, b, window, protocol.data_range)
        factor = ssim if scale == scales - 1 else contrast
        product = product * factor.relu() ** weight
        a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return product


def _window_width(sigma: float) -> int:
    return 2 * int(3.5 * sigma + 0.5) + 1


def _gaussian_window(sigma: float, like: Tensor) -> Tensor:
    half = _window_width(sigma) // 2
    offsets = torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)
    window = torch.exp(-((offsets / sigma) ** 2) / 2)
    return window / window.sum()


def _ssim_terms(a: Tensor, b: Tensor, window: Tensor, data_range: float | None) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor, both [P]: means over channels and whole windows."""
    if data_range is None:
        # Clamped so that all-constant maps compare as equal instead of as 0 / 0.
        span = torch.maximum(a.max() - a.min(), b.max() - b.min()).clamp_min(1e-12)
    else:
        span = torch.tensor(data_range, dtype=a.dtype, device=a.device)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    maps = torch.cat((a, b, a * a, b * b, a * b))
    planes = maps.reshape(-1, 1, *maps.shape[2:])
    planes = functional.conv2d(planes, window.view(1, 1, 1, -1))
    planes = functional.conv2d(planes, window.view(1, 1, -1, 1))
    mean_a, mean_b, aa, bb, ab = planes.reshape(5, len(a), -1).unbind()
    variance_a = (aa - mean_a**2).clamp_min(0)
    variance_b = (bb - mean_b**2).clamp_min(0)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (variance_a + variance_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * contrast).mean(1), contrast.mean(1)
