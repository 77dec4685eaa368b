"""The compiled operators: the value projection of a cross-attention, and its activation statistics.

Notation, here and in the C++ sources: B prompts, T tokens, K `in_features`, N `out_features` (neurons);
e = `hidden` [B, T, K], W = `weight` [N, K], s = `scale` [N] or [B, N], v = `values` [B, T, N],
a = `activation` [B, N].

The schemas are in csrc/registration.cpp, the kernels in csrc/cpu and csrc/cuda; this file adds what PyTorch wants to
know in Python: result shapes (fakes), gradients, autocast. `nemo_ext.reference` has the same in plain PyTorch.

On the CPU the kernels have a variant for each kind of CPU (docs/cpu-kernels.md): amx, avx512_bf16, avx512, avx2, and
default, whose product is PyTorch's own. The fastest one runs; `nemo-ext info` says which and why. The environment
variable NEMO_EXT_CPU_CAPABILITY overrides the choice, which the first call makes. Results are bit-identical from run to
run and for any number of threads, and a prompt's results do not depend on the other prompts of the call; from one
variant to another they differ in rounding.

On CUDA a call enqueues its kernels on the current stream and returns: nothing waits for the GPU, and calls can be
captured into a CUDA graph. What is wrong with the data rather than with the arguments can then raise nothing, see
`value_projection_stats`. float32 is computed on the tensor cores, each product as three of TF32, in float32's
precision. Results are bit-identical from run to run on one GPU, and a prompt's values and activations do not depend on
the other prompts of the call; `mean` and `m2` differ in rounding from one model of GPU to another.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
        f"nemo_ext's compiled operators do not load with torch {torch.__version__} ({error}): they need torch 2.13 or "
        "later; rebuild them with 'pip install --force-reinstall --no-deps .' in the source tree."
    ) from error


def value_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    r"""Value projection of a cross-attention with every neuron multiplied by a factor: 1 leaves it, 0 switches it off.

    .. math:: v_{btn} = \Big(\sum_k e_{btk} W_{nk} + \mathrm{bias}_n\Big) \cdot s_{(b)n}

    Finding NeMo (arXiv 2406.02366), section 3: neurons are blocked by setting their values to zero.

    Args:
        hidden: [B, T, K], float32, bfloat16 or float16; any strides. Other leading shapes [..., K] are accepted too,
            unless `scale` is [B, N].
        weight: [N, K], the dtype of `hidden`; any strides.
        bias: [N], the dtype of `hidden` or float32.
        scale: [N] for all prompts, or [B, N] with a row per prompt; the dtype of `hidden` or float32.

    Returns:
        values: [B, T, N] (or [..., N]), the dtype of `hidden`, contiguous. Sums are in float32 and rounded once, after
        the multiplication. Not finite where an operand of a sum is not: 0 does not hide an infinity.
        On the CPU a prompt's neurons cost no multiplications where a whole group of 32 (AVX-512; AVX2: 16, portable: 8)
        is switched off, and what would overflow in their sums is 0 then.

    Differentiable in all four arguments, also where `scale` is 0, and twice. Under `torch.autocast` `hidden`,
    `weight` and `bias` are cast as for `torch.nn.functional.linear`; a float32 `scale` is left alone.

    Raises:
        RuntimeError: an argument's shape, dtype or device is wrong; the message names it, what was wanted, what came.
    """
    if hidden.dim() == 3 or hidden.dim() == 0:
        return torch.ops.nemo_ext.value_projection(hidden, weight, bias, scale)
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
    r"""Value projection, each neuron's activation on each prompt, and running statistics of it over prompts.

    .. math:: a_{bn} = \frac{1}{|\mathrm{mask}_b|} \sum_{t \in \mathrm{mask}_b}
              \Big| \sum_k e_{btk} W_{nk} + \mathrm{bias}_n \Big|

    Finding NeMo (arXiv 2406.02366), section 3: the activation is taken before `scale`, so that switched-off neurons
    go on being measured. The call's prompts become one (count, mean, sum of squared deviations) by Welford's update in
    float32, which Chan's formula merges into the float64 running buffers; a sum of squares is never formed.

    Args:
        hidden: [B, T, K], float32, bfloat16 or float16; any strides.
        weight: [N, K], the dtype of `hidden`; any strides.
        bias: [N] or None, the dtype of `hidden` or float32.
        scale: [N], [B, N] or None, the dtype of `hidden` or float32; enters the values only.
        token_mask: [B, T] bool or None: True where a token enters the mean. Values are of all tokens.
        count: [], float64, changed in place: prompts seen so far.
        mean: [N], float64, contiguous, changed in place: their mean activation.
        m2: [N], float64, contiguous, changed in place: sum of squared deviations; the unbiased variance is
            ``m2 / (count - 1)``.
        return_values: False saves writing the values where only activations are wanted.

    Returns:
        values: as of `value_projection`, or None.
        activation: [B, N], float32.

    Not differentiable: the results never require a gradient. Autocast acts as on `value_projection`.

    Raises:
        RuntimeError: an argument's shape, dtype or device is wrong, or there are no tokens; and, on the CPU, the mask
            leaves a prompt no token, or an activation is not finite (the message names prompt and neuron). `count`,
            `mean` and `m2` are then unchanged.

    On CUDA a mask without a token and an activation that is not finite raise nothing: the prompt's `activation` is NaN
    or infinite, and `count`, `mean` and `m2` are unchanged by the whole call. To know, compare `count`, when it is read
    anyway, with the number of prompts that were given.
    """
    values, activation = torch.ops.nemo_ext.value_projection_stats(
        hidden, weight, bias, scale, token_mask, count, mean, m2, return_values
    )
    return (values if return_values else None), activation


def _check_devices(**tensors: Tensor | None) -> None:
    """Where one tensor is on `meta` the fakes run instead of the kernels, which check all else."""
    hidden = tensors["hidden"]
    assert hidden is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"{name} must be on {hidden.device} like hidden, got {tensor.device}")


@torch.library.register_fake("nemo_ext::value_projection")
def _value_projection_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    _check_devices(hidden=hidden, weight=weight, bias=bias, scale=scale)
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], weight.shape[0])


@torch.library.register_fake("nemo_ext::value_projection_stats")
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


@torch.library.register_fake("nemo_ext::value_projection_scale_gradient")
def _scale_gradient_fake(gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices(hidden=hidden, gradient=gradient, weight=weight, bias=bias)
    return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _input_gradients(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias: products that a library does best."""
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
        # Projected anew, for values / scale does not exist where a neuron is switched off.
        by_prompt = torch.ops.nemo_ext.value_projection_scale_gradient(gradient, hidden, weight, bias)
        grad_scale = (by_prompt if scale.dim() == 2 else by_prompt.sum(0)).to(scale.dtype)
    return *_input_gradients(gradient, hidden, weight, bias, scale, ctx.needs_input_grad[:3]), grad_scale


def _scale_gradient_backward(ctx: Any, gradient_of_sums: Tensor) -> tuple[Tensor | None, ...]:
    """The sums are linear in what was multiplied: each factor's gradient is the projection with the other as scale."""
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

_implementations = torch.library.Library("nemo_ext", "IMPL")
# Without it PyTorch would warn at every backward pass that happens near a statistics call.
_implementations.impl("value_projection_stats", torch.library.fallthrough_kernel, "Autograd")


def _autocast(operator: Any, device_type: str) -> Any:
    """Kernel of an autocast key: casts what `torch.nn.functional.linear` would have cast, then calls `operator`."""

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
