"""Structural similarity of noise differences (docs/method.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol


def similarity_scales(height: int, width: int, window_sigma: float = 1.5) -> int:
    """M ≤ 3, the number of scales of the similarity for maps of a given size (docs/method.md, section 4).

    M is the largest number for which ⌊min(height, width) / 2^(M−1)⌋ is at least the width of the window. For the
    default window, 11 wide, M is 3 from a size of 44, 2 from 22, and 1 from 11.

    Args:
        height, width: the size of the maps, in latent pixels.
        window_sigma: the standard deviation of the Gaussian window, in latent pixels.

    Raises:
        NemoError: the maps are smaller than the window.
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
    """Structural similarity of pairs of maps (docs/method.md, section 4).

    This is MS-SSIM (Wang, Simoncelli and Bovik, 2003) with M = `similarity_scales` scales, and plain SSIM for M = 1.
    The weight of each scale is 0.33 for M = 3, as in the published code, and 1/M otherwise. K₁ = 0.01 and K₂ = 0.03 are
    SSIM's usual constants. With several scales, negative factors are replaced by 0. Only windows that lie wholly inside
    the map are averaged, as in torchmetrics up to version 1.3, which the published code used; later versions include
    the border.

    Args:
        a, b: P pairs of maps, [P, C, H, W] float32, with values in [0, 1].
        protocol: `data_range` and `window_sigma` are read. If `data_range` is None, the range is inferred at every
            scale: it is the larger one of the ranges of a and b over all P pairs.

    Returns:
        The similarity of each pair, [P] float32; 1 for equal maps. Deterministic on the CPU.

    Raises:
        NemoError: the maps are smaller than the window.
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
    # torchmetrics, which the published code uses, computes the width from σ in this way.
    return 2 * int(3.5 * sigma + 0.5) + 1


def _gaussian_window(sigma: float, like: Tensor) -> Tensor:
    half = _window_width(sigma) // 2
    offsets = torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)
    window = torch.exp(-((offsets / sigma) ** 2) / 2)
    return window / window.sum()


def _ssim_terms(a: Tensor, b: Tensor, window: Tensor, data_range: float | None) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor, both [P]: means over the channels and all windows inside the maps."""
    if data_range is None:
        # Without the lower bound, the similarity of constant maps would be 0 / 0. With it, equal ones have 1.
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
