"""AUROC, TPR at 1 % FPR and bootstrap intervals, against torchmetrics and plain loops."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_roc

from nemo_ext.evaluate.roc import Resamples, Scores, auroc, false_positives_allowed, tpr_at_1_percent_fpr


def tied_scores(memorized: int, ordinary: int, values: int, seed: int = 0) -> tuple[Scores, Scores]:
    """Scores of two classes that overlap, with few different values, all in [0, 1] as torchmetrics wants them."""
    generator = np.random.default_rng(seed)
    return (
        np.minimum(generator.integers(values, size=memorized) + values // 3, values) / values,
        generator.integers(values, size=ordinary) / values,
    )


def both(memorized: Scores, ordinary: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([1] * len(memorized) + [0] * len(ordinary))
    return torch.tensor(np.concatenate((memorized, ordinary))), labels


def pairs_won(memorized: Scores, ordinary: Scores) -> float:
    """The share of pairs in which the memorized prompt has the higher score; a tie counts as half a pair."""
    difference = memorized[:, None] - ordinary
    return float(np.mean((difference > 0) + (difference == 0) / 2))


@pytest.mark.parametrize("values", [2, 8, 10_000])
def test_auroc_is_that_of_torchmetrics_also_with_ties(values: int) -> None:
    memorized, ordinary = tied_scores(23, 57, values)
    assert auroc(memorized, ordinary) == pytest.approx(binary_auroc(*both(memorized, ordinary)).item(), abs=1e-6)


def test_auroc_is_a_half_if_all_scores_are_equal() -> None:
    assert auroc(np.ones(3), np.ones(5)) == 0.5


def test_auroc_counts_an_infinite_score_as_the_highest() -> None:
    assert auroc(np.array([np.inf, 0.0]), np.array([1.0, 2.0])) == 0.5


@pytest.mark.parametrize("ordinary", [40, 100, 250])
@pytest.mark.parametrize("values", [8, 60, 10_000])
def test_tpr_is_the_highest_of_the_roc_curve_up_to_1_percent_fpr(ordinary: int, values: int) -> None:
    scores = tied_scores(31, ordinary, values)
    fpr, tpr, _ = binary_roc(*both(*scores))
    assert tpr_at_1_percent_fpr(*scores) == pytest.approx(tpr[fpr <= 0.01 + 1e-9].max().item(), abs=1e-6)


def test_one_false_positive_is_allowed_among_100_ordinary_prompts_and_none_among_99() -> None:
    assert [false_positives_allowed(count) for count in (1, 99, 100, 299)] == [0, 0, 1, 2]
    memorized = np.array([2.0, 2.0])
    ordinary = np.array([3.0] + [1.0] * 99)
    assert tpr_at_1_percent_fpr(memorized, ordinary) == 1
    assert tpr_at_1_percent_fpr(memorized, ordinary[:99]) == 0


def test_resamples_draw_each_class_from_its_own_prompts() -> None:
    drawn = Resamples.draw(3, 7, 200, seed=0)
    assert drawn.memorized.shape == (200, 3)
    assert drawn.ordinary.shape == (200, 7)
    assert set(drawn.memorized.flat) == set(range(3))
    assert set(drawn.ordinary.flat) == set(range(7))


def test_an_interval_is_the_same_each_time_and_another_one_with_another_seed() -> None:
    scores = tied_scores(20, 40, 50)
    first, again, other = (Resamples.draw(20, 40, 100, seed).estimate(auroc, *scores) for seed in (0, 0, 1))
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    memorized, ordinary = tied_scores(20, 40, 50)
    estimate = Resamples.draw(20, 40, 2000, seed=0).estimate(auroc, memorized, ordinary)
    generator = np.random.default_rng(9)
    plain = []
    for _ in range(2000):
        some, others = generator.choice(memorized, 20), generator.choice(ordinary, 40)
        plain.append(pairs_won(some, others))
    assert estimate.value == pytest.approx(pairs_won(memorized, ordinary), abs=1e-12)
    assert estimate.low == pytest.approx(np.percentile(plain, 2.5), abs=0.015)
    assert estimate.high == pytest.approx(np.percentile(plain, 97.5), abs=0.015)
