"""An error names the wrong argument, what it must be and what it is, and leaves the running buffers unchanged."""

import re

import op_cases
import pytest
import torch

from nemo_ext import ops


def good(device):
    """Return valid arguments of three prompts, five tokens, K = 17 and N = 7."""
    return {
        "hidden": torch.randn(3, 5, 17, device=device),
        "weight": torch.randn(7, 17, device=device),
        "bias": torch.randn(7, device=device),
        "scale": torch.randn(3, 7, device=device),
        "token_mask": torch.ones(3, 5, dtype=torch.bool, device=device),
        **op_cases.running_buffers(7, device),
    }


def assert_refused(device, message, **wrong):
    """Check that the statistics operator raises `message` and leaves the running buffers unchanged."""
    arguments = good(device)
    ops.value_projection_stats(**arguments)
    before = {key: arguments[key].clone() for key in ("count", "mean", "m2")}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.value_projection_stats(**{**arguments, **wrong})
    assert all(torch.equal(arguments[key], before[key]) for key in before)


OF_BOTH = [
    ("hidden", torch.randn(17), "hidden must have shape [batch, tokens, in_features], got [17]"),
    ("hidden", torch.randn(3, 5, 17).double(), "hidden must be float32, bfloat16 or float16, got float64"),
    (
        "weight",
        torch.randn(17, 7),
        "weight must have shape [out_features, in_features] with in_features = 17, got [17, 7]",
    ),
    ("weight", torch.randn(7, 17).half(), "weight must be float32, got float16"),
    ("bias", torch.randn(1), "bias must have shape [out_features] = [7], got [1]"),
    ("bias", torch.randn(7).half(), "bias must be float32, got float16"),
    ("scale", torch.randn(3), "scale must have shape [out_features] = [7], got [3]"),
    ("scale", torch.randn(1, 7), "scale must have shape [out_features] or [batch, out_features] = [3, 7], got [1, 7]"),
    ("scale", torch.randn(7).double(), "scale must be float32, got float64"),
]
OF_STATISTICS = [
    ("token_mask", torch.ones(5, dtype=torch.bool), "token_mask must have shape [batch, tokens] = [3, 5], got [5]"),
    ("token_mask", torch.ones(3, 5), "token_mask must be bool, got float32"),
    ("count", torch.zeros(1, dtype=torch.float64), "count must have shape [] = [], got [1]"),
    ("count", torch.zeros((), dtype=torch.int64), "count must be float64, got int64"),
    ("mean", torch.zeros(6, dtype=torch.float64), "mean must have shape [out_features] = [7], got [6]"),
    ("mean", torch.zeros(7), "mean must be float64, got float32"),
    ("m2", torch.zeros(7), "m2 must be float64, got float32"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), OF_BOTH)
def test_value_projection_says_what_is_wrong(name, wrong, message, device):
    arguments = {key: value for key, value in good(device).items() if key in ("hidden", "weight", "bias", "scale")}
    arguments[name] = wrong.to(device)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.nemo_ext.value_projection(**arguments)


@pytest.mark.parametrize(("name", "wrong", "message"), OF_BOTH + OF_STATISTICS)
def test_statistics_say_what_is_wrong_and_leave_the_buffers_unchanged(name, wrong, message, device):
    assert_refused(device, message, **{name: wrong.to(device)})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(3, 7), "gradient must have shape [batch, tokens, out_features] = [3, 5, 7], got [3, 7]"),
        (torch.randn(3, 5, 7).half(), "gradient must be float32, got float16"),
        (torch.randn(3, 5, 7, device="meta"), "gradient must be on {device} like hidden, got meta"),
    ],
)
def test_the_gradient_of_the_values_is_checked(wrong, message, device):
    hidden, weight, bias = (good(device)[name] for name in ("hidden", "weight", "bias"))
    gradient = wrong if wrong.is_meta else wrong.to(device)
    with pytest.raises(RuntimeError, match=re.escape(message.format(device=device))):
        torch.ops.nemo_ext.value_projection_scale_gradient(gradient, hidden, weight, bias)


def test_a_running_buffer_with_gaps_is_refused(device):
    mean = torch.zeros(14, dtype=torch.float64, device=device)[::2]
    assert_refused(device, "mean must be contiguous because it is updated in place, got stride 2", mean=mean)


def test_no_tokens_at_all_is_an_error_of_the_statistics(device):
    hidden = torch.randn(3, 0, 17, device=device)
    message = "hidden must leave at least one token of every prompt, got none"
    assert_refused(device, message, hidden=hidden, token_mask=None)


@pytest.mark.leg("cpu")
def test_a_prompt_without_a_token_in_its_mask_is_named(device):
    mask = torch.tensor([True, True, False]).unsqueeze(1).expand(3, 5)
    message = "token_mask must leave at least one token of every prompt, got none for prompt 2"
    assert_refused(device, message, token_mask=mask)


@pytest.mark.leg("cpu")
def test_an_activation_that_is_not_finite_is_named(device):
    hidden = torch.zeros(3, 5, 17).index_fill(0, torch.tensor(1), torch.nan)
    assert_refused(device, "got nan for prompt 1, neuron 0: count, mean and m2 are unchanged", hidden=hidden)


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("size", [2.0**50, 3e37])
def test_an_activation_whose_square_could_overflow_is_named(size, device):
    """Squared deviations of such activations could make m2 infinite for good."""
    hidden = torch.zeros(3, 5, 17).index_fill(0, torch.tensor(1), size)
    weight = torch.eye(7, 17)
    message = "activation must be finite and less than 2**50 to enter the running statistics"
    assert_refused(device, message, hidden=hidden, weight=weight)


def test_a_bias_beside_half_precision_may_be_float32_or_the_same(device):
    hidden, weight = (torch.randn(shape, dtype=torch.float16, device=device) for shape in ((3, 5, 17), (7, 17)))
    with pytest.raises(RuntimeError, match="bias must be float32 or float16 like hidden, got bfloat16"):
        ops.value_projection(hidden, weight, torch.randn(7, dtype=torch.bfloat16, device=device))


def test_mean_and_m2_that_share_memory_are_refused(device):
    arguments = good(device)
    arguments["m2"] = arguments["mean"]
    with pytest.raises(RuntimeError, match="mean and m2 must not share memory"):
        ops.value_projection_stats(**arguments)


def test_a_scale_per_prompt_needs_a_batch_of_prompts(device):
    hidden, weight, scale = (torch.randn(shape, device=device) for shape in ((3, 17), (7, 17), (3, 7)))
    with pytest.raises(RuntimeError, match=r"scale must have shape \[out_features\] unless hidden is \[batch"):
        ops.value_projection(hidden, weight, scale=scale)


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "token_mask", "count", "mean", "m2"])
def test_a_tensor_on_another_device_is_named(name, device):
    elsewhere = {name: good(device)[name].to("meta")}
    assert_refused(device, f"{name} must be on {device} like hidden, got meta", **elsewhere)
