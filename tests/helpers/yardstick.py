"""The limit for rounding errors of the operators: the error of the same computation with sequential float32 sums.

Every sum adds one term after another in float32; each product and each sum is rounded once, and results are rounded to
the dtype of `hidden` where PyTorch would round. IEEE arithmetic alone decides the bits, so no test depends on the
library that multiplies matrices in PyTorch, or on the width of a CPU's vectors. An operator may have twice this error
against float64, plus one rounding of the result.
"""

import numpy as np
import torch


def sum_over_tokens(terms):
    """Return Σ_t terms[:, t], added in the order of t."""
    total = terms.new_zeros(terms.shape[0], *terms.shape[2:])
    for term in terms.unbind(1):
        total += term
    return total


def sum_of_products(hidden, weight):
    """Return Σ_k hidden[..., k] · weight[:, k] in float32, added in the order of k by NumPy, which uses one thread."""
    left, right = hidden.float().cpu().numpy(), weight.float().cpu().numpy().T.copy()
    total = np.zeros((*left.shape[:-1], right.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k, row in enumerate(right):
            total += left[..., k, None] * row
    return torch.from_numpy(total).to(hidden.device)


def values(hidden, weight, bias, scale):
    projected = sum_of_products(hidden, weight)
    if bias is not None:
        projected += bias.to(hidden.dtype).float()
    projected = projected.to(hidden.dtype)
    if scale is not None:
        projected = projected * (scale.unsqueeze(1) if scale.dim() == 2 else scale).to(hidden.dtype)
    return projected


def activation(hidden, weight, bias, mask):
    counted = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.float()
    size = values(hidden, weight, bias, None).abs().float()
    return sum_over_tokens(size * counted.unsqueeze(-1)) / counted.sum(1, keepdim=True)


def scale_gradient(gradient, hidden, weight, bias):
    return sum_over_tokens(gradient.float() * values(hidden, weight, bias, None).float())


def largest(errors):
    return errors.abs().max()


def root_mean_square(errors):
    """Use this where a result has few elements: the largest of few errors varies by chance."""
    return errors.square().mean().sqrt()


def assert_as_exact(ours, sequential, exact, size=largest):
    """Compare our error with that of `sequential`, which this file computes; `exact` is the result in float64."""
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps * size(exact)
    assert size(ours.double() - exact) <= 2 * size(sequential.double() - exact) + rounding
