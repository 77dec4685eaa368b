"""A wrong argument is named, with what was wanted and what came, and the running buffers stay as they were."""

import re

import op_cases
import pytest
import torch

from nemo_ext import ops


def good():
    """Arguments that work: three prompts, five tokens, K = 17, N = 7."""
    return {
        "hidden": torch.randn(3, 5, 17),
        "weight": torch.randn(7, 17),
        "bias": torch.randn(7),
        "scale": torch.randn(3, 7),
        "token_mask": torch.ones(3, 5, dtype=torch.bool),
        **op_cases.running_buffers(7),
    }


NAN_IN_THE_SECOND_PROMPT = torch.zeros(3, 5, 17).index_fill(0, torch.tensor(1), torch.nan)
NO_TOKEN_IN_THE_THIRD_PROMPT = torch.tensor([True, True, False]).unsqueeze(1).expand(3, 5)

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
    (
        "token_mask",
        NO_TOKEN_IN_THE_THIRD_PROMPT,
        "token_mask must leave at least one token of every prompt, got none for prompt 2",
    ),
    ("count", torch.zeros(1, dtype=torch.float64), "count must have shape [] = [], got [1]"),
    ("count", torch.zeros((), dtype=torch.int64), "count must be float64, got int64"),
    ("mean", torch.zeros(6, dtype=torch.float64), "mean must have shape [out_features] = [7], got [6]"),
    ("mean", torch.zeros(7), "mean must be float64, got float32"),
    (
        "mean",
        torch.zeros(14, dtype=torch.float64)[::2],
        "mean must be contiguous because it is updated in place, got stride 2",
    ),
    ("m2", torch.zeros(7), "m2 must be float64, got float32"),
    ("hidden", NAN_IN_THE_SECOND_PROMPT, "got nan for prompt 1, neuron 0: count, mean and m2 are unchanged"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), OF_BOTH)
def test_value_projection_says_what_is_wrong(name, wrong, message):
    arguments = {key: value for key, value in good().items() if key in ("hidden", "weight", "bias", "scale")}
    arguments[name] = wrong
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.nemo_ext.value_projection(**arguments)


@pytest.mark.parametrize(("name", "wrong", "message"), OF_BOTH + OF_STATISTICS)
def test_statistics_say_what_is_wrong_and_leave_the_buffers(name, wrong, message):
    arguments = good()
    ops.value_projection_stats(**arguments)
    before = {key: arguments[key].clone() for key in ("count", "mean", "m2")}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.value_projection_stats(**{**arguments, name: wrong})
    assert all(torch.equal(arguments[key], before[key]) for key in before)


def test_a_bias_beside_half_precision_may_be_float32_or_the_same():
    hidden, weight = torch.randn(3, 5, 17, dtype=torch.float16), torch.randn(7, 17, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="bias must be float32 or float16 like hidden, got bfloat16"):
        ops.value_projection(hidden, weight, torch.randn(7, dtype=torch.bfloat16))


def test_no_tokens_at_all_is_an_error_of_the_statistics():
    arguments = {**good(), "hidden": torch.randn(3, 0, 17), "token_mask": None}
    with pytest.raises(RuntimeError, match="hidden must leave at least one token of every prompt, got none"):
        ops.value_projection_stats(**arguments)


def test_mean_and_m2_must_be_different_memory():
    arguments = good()
    arguments["m2"] = arguments["mean"]
    with pytest.raises(RuntimeError, match="mean and m2 must not share memory"):
        ops.value_projection_stats(**arguments)


def test_a_scale_per_prompt_needs_prompts():
    with pytest.raises(RuntimeError, match=r"scale must have shape \[out_features\] unless hidden is \[batch"):
        ops.value_projection(torch.randn(3, 17), torch.randn(7, 17), scale=torch.randn(3, 7))


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "token_mask", "count", "mean", "m2"])
def test_a_tensor_on_another_device_is_named(name):
    arguments = good()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on cpu like hidden, got meta"):
        ops.value_projection_stats(**arguments)
