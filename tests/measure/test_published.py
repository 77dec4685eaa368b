"""Statistics in the published file format: written as the published code reads them, and read as it writes them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import OF_BYTES
from diffusers import StableDiffusionPipeline
from tiny_pipeline import DOWN_AND_MID, tiny_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import prompt_activations
from nemo_ext.measure.published import PUBLISHED_COUNT, PublishedStatistics
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics

PROMPTS = ("red cat", "blue dog", "green boat", "a house")
VECTOR = torch.ones(3)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def statistics(pipe: StableDiffusionPipeline) -> ActivationStatistics:
    return collect_statistics(pipe, PROMPTS)


@pytest.fixture
def file(statistics: ActivationStatistics, tmp_path: Path) -> Path:
    path = tmp_path / "statistics.pt"
    PublishedStatistics.of(statistics).save(path)
    return path


def published_code(pipe: StableDiffusionPipeline) -> tuple[list[Tensor], list[Tensor]]:
    """What the published script stores: the layers' activations of all prompts, stacked, and their mean and std."""
    activations = prompt_activations(pipe, PROMPTS, tuple(DOWN_AND_MID))
    return [a.mean(dim=0) for a in activations.values()], [a.std(dim=0) for a in activations.values()]


def test_what_is_written_is_what_the_published_code_writes(pipe: StableDiffusionPipeline, file: Path) -> None:
    mean_list, std_list = torch.load(file, weights_only=True)
    for written, wanted in zip((mean_list, std_list), published_code(pipe), strict=True):
        assert isinstance(written, list)
        for one, other in zip(written, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_file_of_the_published_code_becomes_the_statistics_of_a_model(
    pipe: StableDiffusionPipeline, statistics: ActivationStatistics, tmp_path: Path
) -> None:
    path = tmp_path / "statistics_v1_4.pt"
    torch.save(published_code(pipe), path)
    read = PublishedStatistics.load(path).for_model(pipe)
    read.check(pipe)
    assert (read.layers, read.count) == (tuple(DOWN_AND_MID), PUBLISHED_COUNT)
    for layer in DOWN_AND_MID:
        torch.testing.assert_close(read.mean[layer], statistics.mean[layer], rtol=1e-5, atol=0)
        torch.testing.assert_close(read.std[layer], statistics.std[layer], rtol=1e-4, atol=1e-7)


def test_the_way_there_and_back_loses_only_float32s_rounding(
    pipe: StableDiffusionPipeline, statistics: ActivationStatistics, file: Path
) -> None:
    read = PublishedStatistics.load(file).for_model(pipe, count=len(PROMPTS))
    assert (read.count, read.fingerprint) == (statistics.count, statistics.fingerprint)
    for layer in DOWN_AND_MID:
        torch.testing.assert_close(read.mean[layer], statistics.mean[layer], rtol=1e-7, atol=0)
        torch.testing.assert_close(read.std[layer], statistics.std[layer], rtol=1e-6, atol=0)


def test_statistics_of_other_layers_are_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(NemoError, match=r"layers with \[3\] neurons, and this model's have \[16, 16"):
        PublishedStatistics((VECTOR,), (VECTOR,)).for_model(pipe)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([VECTOR], "in two lists of vectors"),
        ((VECTOR, VECTOR), "in two lists of vectors"),
        ({"mean": [VECTOR], "std": [VECTOR]}, "in two lists of vectors"),
        (([VECTOR[None]], [VECTOR]), "in two lists of vectors"),
        (([VECTOR.long()], [VECTOR]), "in two lists of vectors"),
        (([], []), "of different neurons"),
        (([VECTOR], [VECTOR, VECTOR]), "of different neurons"),
        (([VECTOR], [VECTOR[:2]]), "of different neurons"),
        (([VECTOR * torch.nan], [VECTOR]), "NaN or infinity"),
        (([VECTOR], [-VECTOR]), "negative"),
        (Path("an object that only a pickle can hold"), "can't be read as statistics of the published code"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(NemoError) as raised:
        PublishedStatistics.load(path)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NemoError, match=r"none\.pt can't be read: No such file"):
        PublishedStatistics.load(tmp_path / "none.pt")


@pytest.mark.parametrize("damage", OF_BYTES)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(damage: Any, file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "damaged.pt"
    refusals = []
    for seed in range(100):
        path.write_bytes(damage(content, random.Random(seed)))
        try:
            read = PublishedStatistics.load(path)
        except NemoError as error:
            refusals.append(str(error))
        else:
            assert all(bool(values.isfinite().all()) for values in (*read.mean, *read.std))
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)
