"""The operators in plain PyTorch and float64: slow, short, and the reference for tests of the compiled operators.

Names, arguments and meaning are those of `nemo_ext.ops`, and so is the notation of the shapes. Every argument may have
any floating-point dtype, and all results are float64. The equations are in docs/method.md, sections 1 and 2. Wrong
arguments raise PyTorch's own errors. Results are as deterministic as PyTorch's operators on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["value_projection", "value_projection_scale_gradient", "value_projection_stats"]

#: Activations of this size or more are refused: the operators sum squared deviations in float32.
ACTIVATION_LIMIT = 2.0**50


def value_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Compute v = (e Wᵀ + bias) · s, as `nemo_ext.ops.value_projection` does.

    Args:
        hidden: [B, T, K], or [..., K] unless `scale` is [B, N].
        weight: [N, K].
        bias: [N] or None.
        scale: [N], [B, N] or None, which acts as 1.

    Returns:
        values: [B, T, N] (or [..., N]), float64; PyTorch's autograd differentiates it.
    """
    values = hidden.double() @ weight.double().T  # [..., T, N]
    if bias is not None:
        values = values + bias.double()
    if scale is not None:
        values = values * (scale.double().unsqueeze(1) if scale.dim() == 2 else scale.double())
    return values


def value_projection_scale_gradient(gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute Σ_t gradient · (e Wᵀ + bias), the gradient of a loss with respect to a scale [B, N].

    Args:
        gradient: [B, T, N], the gradient of the loss with respect to the values.
        hidden: [B, T, K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        scale_gradient: [B, N], float64.
    """
    return (gradient.double() * value_projection(hidden, weight, bias)).sum(1)


def value_projection_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    token_mask: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    return_values: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Compute values and activations as `nemo_ext.ops.value_projection_stats` does, and update the running buffers.

    The buffers are updated by Chan's formula, as there; see docs/method.md, section 2.

    Args:
        hidden: [B, T, K].
        weight: [N, K].
        bias: [N] or None.
        scale: [N], [B, N] or None. It affects the values only.
        token_mask: [B, T], bool, or None for all tokens. It is True for the tokens that the mean includes.
        count: [], float64, changed in place: the number of prompts so far.
        mean: [N], float64, changed in place: the mean activation of these prompts.
        m2: [N], float64, changed in place: the sum of squared deviations from that mean.
        return_values: whether to return the values.

    Returns:
        values: [B, T, N], float64, or None if `return_values` is False.
        activation: [B, N], float64.

    Raises:
        RuntimeError: an activation is not finite, or 2⁵⁰ or more. `count`, `mean` and `m2` are then unchanged.
    """
    size = value_projection(hidden, weight, bias).abs()  # [B, T, N]
    mask = torch.ones(size.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
    kept = size.masked_fill(~mask.unsqueeze(-1).to(size.device), 0)
    activation = kept.sum(1) / mask.sum(1, keepdim=True).to(size.device)  # [B, N]
    if not (activation < ACTIVATION_LIMIT).all():
        raise RuntimeError("activation must be finite and less than 2**50 to enter the running statistics")
    if activation.shape[0] > 0:
        added = activation.shape[0]
        total = count + added
        difference = activation.mean(0) - mean
        m2 += (activation - activation.mean(0)).square().sum(0) + difference.square() * (count * added / total)
        mean += difference * (added / total)
        count += added
    return (value_projection(hidden, weight, bias, scale) if return_values else None), activation
