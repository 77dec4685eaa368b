"""The compiled operators: the value projection of a cross-attention, and its activation statistics.

Notation, here and in the C++ sources: B prompts, T tokens, K `in_features`, N `out_features` (neurons);
e = `hidden` [B, T, K], W = `weight` [N, K], s = `scale` [N] or [B, N], v = `values` [B, T, N],
a = `activation` [B, N]. All of them are plain numbers without a unit.

The schemas are in csrc/registration.cpp and the kernels in csrc/cpu and csrc/cuda. This file adds what PyTorch needs in
Python: fakes (the shapes of the results), gradients and autocast. `nemo_ext.reference` has the same operators in plain
PyTorch.

On the CPU there are several variants of the kernels (docs/cpu-kernels.md): amx, avx512_bf16, avx512, avx2, and default,
in which PyTorch computes the products. The first call chooses the fastest variant, unless the environment variable
NEMO_EXT_CPU_CAPABILITY names one; `nemo-ext info` prints the choice and its reason. Results are bit-identical from run
to run and for any number of threads, and a prompt's results do not depend on the other prompts of the call. Results
differ between variants in rounding.

On CUDA a call enqueues its kernels on the current stream and returns without waiting for the GPU, so calls can be
captured into a CUDA graph. Errors in the data, unlike errors in the arguments, then raise no exception, see
`value_projection_stats`. float32 products run on the tensor cores, each as three products in TF32, with the precision
of float32. There are two paths (docs/kernels.md): one kernel that computes everything, and a kernel that finishes the
products of PyTorch's library, which GPUs from sm_90 on take in 16 bits. The environment variable NEMO_EXT_CUDA_PATH,
kernel or library, decides instead. Results are bit-identical from run to run on one GPU. On the path of the kernel, a
prompt's values and activations do not depend on the other prompts of the call; on that of the library they may, in
rounding. `mean` and `m2` differ in rounding between GPU models. The first call on a device compares a small case with
`nemo_ext.reference`, and waits for the GPU once.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_ext.first_use import check_once

__all__ = ["value_projection", "value_projection_stats"]

try:
    importlib.import_module("nemo_ext._C")
except ModuleNotFoundError as error:
    raise ImportError(
        f"nemo_ext in {__file__.rsplit('/', 1)[0]} has no compiled operators: if it is a source tree, start Python in "
        "another folder to use the installed package, or build in place with 'pip install -e .'."
    ) from error
except ImportError as error:
    raise ImportError(
        f"nemo_ext's compiled operators do not load with torch {torch.__version__} ({error}): they need torch 2.10 or "
        "later; rebuild them with 'pip install --force-reinstall --no-deps .' in the source tree."
    ) from error


def value_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    r"""Compute the value projection of a cross-attention, with each neuron multiplied by its scale.

    .. math:: v_{btn} = \Big(\sum_k e_{btk} W_{nk} + \mathrm{bias}_n\Big) \cdot s_{(b)n}

    This is the first equation of docs/method.md, section 1. A scale of 1 leaves a neuron as it is, and a scale of 0
    switches it off.

    Args:
        hidden: [B, T, K], float32, bfloat16 or float16; any strides. Other leading shapes [..., K] are accepted too,
            unless `scale` is [B, N].
        weight: [N, K], the dtype of `hidden`; any strides.
        bias: [N] or None, the dtype of `hidden` or float32; any strides.
        scale: [N] for all prompts, [B, N] with a row per prompt, or None, which acts as 1; the dtype of `hidden` or
            float32; any strides.

    Returns:
        values: [B, T, N] (or [..., N]), the dtype of `hidden`, contiguous. Sums are computed in float32, and a value is
        rounded once, after the multiplication with its scale. A value is not finite if an operand of its sum is not,
        also if its scale is 0.

    On the CPU, a prompt's products are not computed for a panel of neurons that are all switched off. A panel has 32
    neurons (avx2: 16, default: 320). The values of such a panel are 0, even if its sums would overflow.

    The operator is differentiable in all four tensors, twice, also at a scale of 0. Under `torch.autocast`, `hidden`,
    `weight` and `bias` are cast as for `torch.nn.functional.linear`, and a float32 `scale` is not cast. Results are
    deterministic, as the docstring of this module describes.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device. The message names the argument, what it must be
            and what it is.

    Source: "Finding NeMo" (arXiv 2406.02366), section 3, blocks neurons by setting their values to zero.
    """
    check_once(hidden)
    values: Tensor
    if hidden.dim() == 3 or hidden.dim() == 0:
        values = torch.ops.nemo_ext.value_projection(hidden, weight, bias, scale)
        return values
    rows = hidden.reshape(1, hidden.shape[:-1].numel(), hidden.shape[-1])
    if scale is not None and scale.dim() != 1:
        raise RuntimeError(
            f"scale must have shape [out_features] unless hidden is [batch, tokens, in_features], "
            f"got {list(scale.shape)} with hidden {list(hidden.shape)}"
        )
    values = torch.ops.nemo_ext.value_projection(rows, weight, bias, scale)
    return values.reshape(*hidden.shape[:-1], weight.shape[0])


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
    r"""Compute the value projection and each neuron's activation on each prompt, and update the running statistics.

    .. math:: a_{bn} = \frac{1}{|\mathrm{mask}_b|} \sum_{t \in \mathrm{mask}_b}
              \Big| \sum_k e_{btk} W_{nk} + \mathrm{bias}_n \Big|

    This is the second equation of docs/method.md, section 1, and the statistics of section 2. The activation is taken
    before the scale, so that switched-off neurons are measured too. The prompts of the call are reduced to a count, a
    mean and a sum of squared deviations by Welford's update in float32, and Chan's formula merges these into the
    float64 running buffers. A sum of squares is never formed.

    Args:
        hidden: [B, T, K], float32, bfloat16 or float16; any strides.
        weight: [N, K], the dtype of `hidden`; any strides.
        bias: [N] or None, the dtype of `hidden` or float32; any strides.
        scale: [N], [B, N] or None, the dtype of `hidden` or float32; any strides. It affects the values only.
        token_mask: [B, T], bool, or None for all tokens; any strides. It is True for the tokens that the mean includes.
            Values are computed for all tokens.
        count: [], float64, changed in place: the number of prompts so far.
        mean: [N], float64, contiguous, changed in place: the mean activation of these prompts.
        m2: [N], float64, contiguous, changed in place: the sum of squared deviations from that mean. The unbiased
            variance is ``m2 / (count - 1)``. `m2` must not share memory with `mean`.
        return_values: whether to return the values. False saves the time and the memory for them.

    Returns:
        values: [B, T, N], the same bits as `value_projection` returns, or None if `return_values` is False.
        activation: [B, N], float32.

    The operator is not differentiable: its results never require a gradient. Autocast acts as on `value_projection`.
    Results are deterministic, as the docstring of this module describes.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or there are no tokens. On the CPU also: the mask
            excludes all tokens of a prompt, or an activation is not finite, or 2⁵⁰ or more, so that its square could
            overflow (the message names prompt and neuron).
            `count`, `mean` and `m2` are then unchanged.

    On CUDA, a mask that excludes all tokens of a prompt and such an activation raise no exception. The activation in
    question is NaN, infinite or too large, and the whole call leaves `count`, `mean` and `m2` unchanged. To detect
    this, compare `count` with the number of prompts that were passed, at a point where `count` is read anyway.

    Sources: "Finding NeMo" (arXiv 2406.02366), section 3, defines the activation. Welford, "Note on a method for
    calculating corrected sums of squares and products", 1962. Chan, Golub, LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979.
    """
    check_once(hidden)
    values, activation = torch.ops.nemo_ext.value_projection_stats(
        hidden, weight, bias, scale, token_mask, count, mean, m2, return_values
    )
    return (values if return_values else None), activation


def _check_devices(**tensors: Tensor | None) -> None:
    """Raise an error if a tensor is not on the device of `hidden`.

    The kernels check that themselves, but if a tensor is on `meta`, a fake runs instead of a kernel.
    """
    hidden = tensors["hidden"]
    assert hidden is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"{name} must be on {hidden.device} like hidden, got {tensor.device}")


def _value_projection_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    _check_devices(hidden=hidden, weight=weight, bias=bias, scale=scale)
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], weight.shape[0])


def _value_projection_stats_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    token_mask: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    return_values: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        hidden=hidden, weight=weight, bias=bias, scale=scale, token_mask=token_mask, count=count, mean=mean, m2=m2
    )
    batch, tokens, _ = hidden.shape
    values = hidden.new_empty(batch, tokens, weight.shape[0]) if return_values else hidden.new_empty(0)
    return values, hidden.new_empty(batch, weight.shape[0], dtype=torch.float32)


def _scale_gradient_fake(gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices(hidden=hidden, gradient=gradient, weight=weight, bias=bias)
    return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)


torch.library.register_fake("nemo_ext::value_projection", _value_projection_fake)
torch.library.register_fake("nemo_ext::value_projection_stats", _value_projection_stats_fake)
torch.library.register_fake("nemo_ext::value_projection_scale_gradient", _scale_gradient_fake)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _input_gradients(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias. They are plain matrix products, so PyTorch computes them."""
    want_hidden, want_weight, want_bias = wanted
    if scale is not None:
        gradient = (gradient * (scale.unsqueeze(1) if scale.dim() == 2 else scale)).to(hidden.dtype)
    return (
        gradient @ weight if want_hidden else None,
        gradient.flatten(0, 1).T @ hidden.flatten(0, 1) if want_weight else None,
        gradient.sum((0, 1), dtype=torch.float32).to(bias.dtype) if want_bias and bias is not None else None,
    )


def _value_projection_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, scale = ctx.saved_tensors
    grad_scale = None
    if ctx.needs_input_grad[3]:
        # The projection is computed again, because values / scale is undefined where the scale is 0.
        by_prompt = torch.ops.nemo_ext.value_projection_scale_gradient(gradient, hidden, weight, bias)
        grad_scale = (by_prompt if scale.dim() == 2 else by_prompt.sum(0)).to(scale.dtype)
    return *_input_gradients(gradient, hidden, weight, bias, scale, ctx.needs_input_grad[:3]), grad_scale


def _scale_gradient_backward(ctx: Any, gradient_of_sums: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the scale gradient Σ_t gradient · (e Wᵀ + bias), which is linear in each of its two factors.

    So the gradient of `gradient` is the projection with `gradient_of_sums` as scale, and the gradients of the
    projection's inputs are those of `value_projection` with that scale.
    """
    gradient, hidden, weight, bias = ctx.saved_tensors
    want_gradient, *wanted = ctx.needs_input_grad
    grad_gradient = None
    if want_gradient:
        grad_gradient = torch.ops.nemo_ext.value_projection(hidden, weight, bias, gradient_of_sums)
    return grad_gradient, *_input_gradients(gradient, hidden, weight, bias, gradient_of_sums, wanted)


torch.library.register_autograd(
    "nemo_ext::value_projection", _value_projection_backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "nemo_ext::value_projection_scale_gradient", _scale_gradient_backward, setup_context=_save_for_backward
)

_library: Any = torch.library  # Any, because torch does not annotate the class Library
_implementations = _library.Library("nemo_ext", "IMPL")
# Without this fallthrough, PyTorch warns in a backward pass that no autograd kernel is registered for the operator.
_implementations.impl("value_projection_stats", torch.library.fallthrough_kernel, "Autograd")


def _autocast(operator: Any, device_type: str) -> Any:
    """Return a kernel for an autocast key: it casts as for `torch.nn.functional.linear`, then calls `operator`."""

    def cast(tensor: Tensor | None, keep: torch.dtype | None = None) -> Tensor | None:
        if tensor is None or tensor.dtype in (torch.float64, keep) or tensor.device.type != device_type:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def kernel(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *others: Tensor | bool | None
    ) -> Any:
        arguments = cast(hidden), cast(weight), cast(bias), cast(scale, keep=torch.float32)
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments, *others)

    return kernel


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name in __all__:
        _implementations.impl(_name, _autocast(getattr(torch.ops.nemo_ext, _name), _device_type), _key)
