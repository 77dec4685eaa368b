"""The operators in plain PyTorch and float64: slow, short, and what the compiled ones are tested against.

Same names, arguments and meaning as in `nemo_ext.ops`; results are float64 whatever came in.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["value_projection", "value_projection_scale_gradient", "value_projection_stats"]


def value_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Twin of `nemo_ext.ops.value_projection`; returns float64 and is differentiable by PyTorch itself."""
    values = hidden.double() @ weight.double().T  # [..., T, N]
    if bias is not None:
        values = values + bias.double()
    if scale is not None:
        values = values * (scale.double().unsqueeze(1) if scale.dim() == 2 else scale.double())
    return values


def value_projection_scale_gradient(gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Twin of the operator in the backward pass of `value_projection`: Σ_t gradient · (e Wᵀ + bias), [B, N] float64."""
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
    """Twin of `nemo_ext.ops.value_projection_stats`; returns float64, and updates the running buffers in place."""
    size = value_projection(hidden, weight, bias).abs()  # [B, T, N]
    mask = torch.ones(size.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
    kept = size.masked_fill(~mask.unsqueeze(-1).to(size.device), 0)
    activation = kept.sum(1) / mask.sum(1, keepdim=True).to(size.device)  # [B, N]
    if not activation.isfinite().all():
        raise RuntimeError("activation must be finite to enter the running statistics")
    if activation.shape[0] > 0:
        added = activation.shape[0]
        total = count + added
        difference = activation.mean(0) - mean
        m2 += (activation - activation.mean(0)).square().sum(0) + difference.square() * (count * added / total)
        mean += difference * (added / total)
        count += added
    return (value_projection(hidden, weight, bias, scale) if return_values else None), activation
