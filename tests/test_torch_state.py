"""Whatever a caller has set in PyTorch: the same result, and the setting as it was."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from tiny_pipeline import Planted, planted_pipeline

import nemo_ext
from nemo_ext.patching.patch import is_patched
from nemo_ext.torch_state import plain_torch

SEEDS = 3


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "gradients off": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
}


def settings() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def measured(planted: Planted) -> dict[str, object]:
    """What the package computes of a pipeline, from the statistics to the neurons."""
    pipe, memorized, ordinary = planted.pipe, planted.memorized_prompt, planted.ordinary_prompts
    statistics = nemo_ext.collect_statistics(pipe, ordinary)
    threshold = nemo_ext.memorization_threshold(pipe, ordinary[:4], seeds=SEEDS)
    found = nemo_ext.localize(pipe, memorized, statistics=statistics, threshold=0.5, seeds=SEEDS)
    with nemo_ext.patched(pipe, found.neurons):
        after = nemo_ext.memorization_score(pipe, memorized, seeds=SEEDS).max
    return {
        "statistics": statistics.digest(),
        "threshold": threshold.scores,
        "score": found.score_before,
        "neurons": found.neurons,
        "samples": found.unet_samples,
        "after": after,
        "images": nemo_ext.memorization_score(
            pipe, memorized, images=True, sampling=nemo_ext.Sampling(seeds=2, steps=2)
        ).max,
    }


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def wanted(planted: Planted) -> dict[str, object]:
    result = measured(planted)
    assert result["neurons"] == planted.neurons
    return result


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_no_result_and_stays(planted: Planted, wanted: dict[str, object], name: str) -> None:
    with SETTINGS[name]():
        before = settings()
        result = measured(planted)
        assert settings() == before
    assert result == wanted
    assert not is_patched(planted.pipe)


def test_gradient_checkpointing_and_training_mode_change_no_result_and_stay(wanted: dict[str, object]) -> None:
    planted = planted_pipeline()
    planted.pipe.unet.enable_gradient_checkpointing()
    planted.pipe.unet.train()
    assert measured(planted) == wanted
    assert planted.pipe.unet.is_gradient_checkpointing
    assert planted.pipe.unet.training


def test_a_pipeline_loaded_under_inference_mode_gives_the_same_results(wanted: dict[str, object]) -> None:
    with torch.inference_mode():
        planted = planted_pipeline()
        planted.pipe.unet.conv_in.weight.mul_(1)
    assert measured(planted) == wanted


def test_settings_come_back_after_an_exception() -> None:
    with torch.inference_mode(), default_dtype(torch.float64):
        before = settings()
        with plain_torch():
            assert settings()[:4] == (False, False, False, torch.float32)
        with pytest.raises(ZeroDivisionError):
            plain_torch()(lambda: 1 / 0)()
        assert settings() == before
