"""Verification: a set is an answer only if the images are gone, and the search goes on while they are not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fake_images import FakeImages, Remaining
from fake_probe import LAYERS, FakeProbe, additive
from fake_task import STATISTICS
from tiny_pipeline import Planted, planted_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.image_similarity import PixelSimilarity
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.measure.threshold import Threshold, memorization_threshold
from nemo_ext.neurons import NeuronSet
from nemo_ext.progress import Progress
from nemo_ext.results.folder import ResultsFolder, read_results
from nemo_ext.results.record import Localization, Verdict
from nemo_ext.search.exhaustive import search_exhaustive
from nemo_ext.search.localizer import Localizer, localize
from nemo_ext.search.outcome import Outcome, Task
from nemo_ext.search.verification import Verification, Verifier

FIRST, SECOND, THIRD = (LAYERS[0], 1), (LAYERS[1], 4), (LAYERS[3], 7)
#: What each neuron contributes to the first step; THIRD carries the image without being needed there.
WEIGHTS = {FIRST: 0.5, SECOND: 0.2, THIRD: 0.05}
TAU, TAU_IMAGE = 0.6, 0.4


def activations() -> dict[str, Tensor]:
    """Neurons of `WEIGHTS` stand out, the more the more they weigh."""
    values = {layer: torch.zeros(9) for layer in LAYERS}
    for number, (layer, index) in enumerate(WEIGHTS):
        values[layer][index] = 6.0 - number
    return values


def shown_by(*carriers: tuple[str, int]) -> Remaining:
    """Every seed shows the image until all carriers are off."""
    wanted = NeuronSet.from_pairs(carriers)
    return lambda neurons, place: 0.1 if len(wanted - neurons) == 0 else 0.9


def verified(
    images: FakeImages,
    threshold: float = TAU,
    search: Callable[[Task], Outcome] = search_exhaustive,
    missed: bool = False,
    **settings: int,
) -> tuple[Outcome, Verdict]:
    verifier = Verifier(
        images,  # type: ignore[arg-type]
        Verification(sampling=Sampling(guidance=1.0), threshold=TAU_IMAGE, **settings),
        prompt="a caption",
        originals={},
    )
    with Progress(False) as bars:
        widths = dict.fromkeys(LAYERS, 9)
        probe = FakeProbe(additive(WEIGHTS))
        task = Task(probe, activations, STATISTICS, widths, threshold, Protocol.paper(), bars)  # type: ignore[arg-type]
        return verifier.search(task, search, missed=missed)


class TestSearch:
    def test_ends_with_the_first_set_if_its_images_are_gone(self) -> None:
        outcome, verdict = verified(FakeImages(shown_by(FIRST)))
        assert outcome.neurons == NeuronSet.from_pairs([FIRST])
        assert verdict.silenced
        assert [trial.criterion for trial in verdict.trials] == ["first step"]

    def test_lowers_the_threshold_while_images_replicate(self) -> None:
        outcome, verdict = verified(FakeImages(shown_by(FIRST, SECOND)))
        assert outcome.neurons == NeuronSet.from_pairs([FIRST, SECOND])
        assert verdict.silenced
        assert verdict.final.criterion.startswith("first step, τ lowered to 0.")
        assert verdict.trials[0].remaining == (0.9,) * 4

    def test_says_which_threshold_the_set_was_found_with(self) -> None:
        outcome, _ = verified(FakeImages(shown_by(FIRST, SECOND)))
        assert outcome.threshold_used is not None
        assert outcome.threshold_used < TAU

    def test_one_seed_that_replicates_is_enough_to_go_on(self) -> None:
        def one_seed(neurons: NeuronSet, place: int) -> float:
            return 0.9 if place == 2 and SECOND not in neurons.pairs() else 0.1

        outcome, verdict = verified(FakeImages(one_seed))
        assert SECOND in outcome.neurons.pairs()
        assert [excess > 1 for excess in verdict.limits.excess(verdict.trials[0])] == [False, False, True, False]

    def test_images_that_are_alike_among_themselves_replicate(self) -> None:
        """Another memorized image has taken the place of the first."""
        images = FakeImages(shown_by(FIRST), diversity=lambda neurons: 0.1 if SECOND in neurons.pairs() else 0.9)
        outcome, verdict = verified(images)
        assert SECOND in outcome.neurons.pairs()
        assert verdict.silenced

    def test_goes_on_by_images_if_a_lower_threshold_finds_the_same_set_again(self) -> None:
        searched = []

        def always_the_first(task: Task) -> Outcome:
            searched.append(task.threshold)
            return search_exhaustive(replace(task, threshold=TAU))

        outcome, verdict = verified(FakeImages(shown_by(THIRD)), search=always_the_first)
        assert searched == [TAU, pytest.approx((0.5 + 0.25) / 2)]
        assert [trial.criterion for trial in verdict.trials].count("first step") == 1
        assert outcome.neurons == NeuronSet.from_pairs([THIRD])

    def test_judges_by_images_where_no_threshold_helps(self) -> None:
        outcome, verdict = verified(FakeImages(shown_by(THIRD)), stricter=0)
        assert outcome.neurons == NeuronSet.from_pairs([THIRD])
        assert verdict.silenced
        assert verdict.final.criterion == "images"
        assert any("found by the images" in note for note in outcome.notes)

    @pytest.mark.parametrize("carriers", [[THIRD], [SECOND]])
    def test_judges_by_images_from_the_start_if_the_first_step_has_missed_the_prompt(
        self, carriers: list[tuple[str, int]]
    ) -> None:
        """With τ = .31 the first step selects and keeps FIRST and SECOND, whose images may even be gone."""
        outcome, verdict = verified(FakeImages(shown_by(*carriers)), threshold=0.31, missed=True)
        assert outcome.neurons == NeuronSet.from_pairs(carriers)
        assert verdict.silenced
        assert not any("lowered" in trial.criterion for trial in verdict.trials)
        assert outcome.notes == ("the set was found by the images, because the first step does not show this prompt",)

    def test_keeps_the_set_of_the_first_step_if_the_images_find_none_that_is_smaller(self) -> None:
        outcome, verdict = verified(FakeImages(shown_by(FIRST)), missed=True)
        assert outcome.neurons == NeuronSet.from_pairs([FIRST])
        assert (verdict.final.criterion, verdict.silenced) == ("first step", True)

    def test_keeps_the_first_set_where_nothing_helps_and_says_so(self) -> None:
        outcome, verdict = verified(FakeImages(lambda neurons, place: 0.9))
        assert outcome.neurons == NeuronSet.from_pairs([FIRST])
        assert not verdict.silenced
        assert verdict.copies == 4
        assert verdict.trials[-1].neurons == 9 * len(LAYERS)

    def test_by_images_stays_within_its_budget(self) -> None:
        images = FakeImages(shown_by(THIRD))
        outcome, verdict = verified(images, stricter=0, budget=5)
        assert verdict.silenced  # a larger set than necessary
        assert THIRD in outcome.neurons.pairs()
        assert any("5 images were spent" in note for note in outcome.notes)
        in_search = images.generated - 4 * len(verdict.trials)
        assert 0 <= in_search <= 5

    def test_by_images_looks_first_at_the_seed_that_failed(self) -> None:
        """Trials of the third seed alone decide, so the others are generated for whole sets only."""

        def third_seed(neurons: NeuronSet, place: int) -> float:
            return 0.9 if place == 2 and THIRD not in neurons.pairs() else 0.1

        images = FakeImages(third_seed)
        outcome, verdict = verified(images, stricter=0)
        assert verdict.silenced
        assert outcome.neurons == NeuronSet.from_pairs([THIRD])
        partial = [places for neurons, places in images.made.items() if 0 < len(places) < 4]
        assert partial
        assert all(places == {2} for places in partial)

    def test_by_images_starts_from_the_candidates_of_the_first_step_if_they_are_enough(self) -> None:
        """With τ = .31 the first step selects all three neurons, and refines them to the wrong two."""
        outcome, verdict = verified(FakeImages(shown_by(FIRST, THIRD)), stricter=0, threshold=0.31)
        assert verdict.silenced
        assert verdict.final.criterion == "images"
        assert outcome.neurons == NeuronSet.from_pairs([FIRST, THIRD])
        assert NeuronSet.from_pairs([FIRST, SECOND, THIRD]) - outcome.initial_neurons == NeuronSet()

    def test_generates_no_image_twice(self) -> None:
        images = FakeImages(shown_by(FIRST))
        _, verdict = verified(images)
        assert verdict.unet_samples == 20 * (4 + 4)


class TestOriginals:
    ORIGINALS: ClassVar = {"a caption": torch.zeros(1, 2), "another caption": torch.ones(1, 2)}

    def verdict(self, images: FakeImages) -> Verdict:
        settings = Verification(sampling=Sampling(guidance=1.0), threshold=TAU_IMAGE)
        verifier = Verifier(images, settings, prompt="a caption", originals=self.ORIGINALS)  # type: ignore[arg-type]
        return verifier.unsearched()[1]

    def test_of_another_prompt_is_named_where_it_appears(self) -> None:
        """`FakeImages.nearest` gives every second seed the image of the other caption."""
        verdict = self.verdict(FakeImages(lambda neurons, place: 0.8))
        assert verdict.instead == (None, "another caption", None, "another caption")

    def test_of_another_prompt_does_not_appear_if_it_is_merely_the_nearest(self) -> None:
        verdict = self.verdict(FakeImages(lambda neurons, place: 0.45))
        assert verdict.instead == (None,) * 4

    def test_similarity_with_them_is_kept(self) -> None:
        verdict = self.verdict(FakeImages(lambda neurons, place: 0.3 + place / 10))
        assert verdict.originals_after == pytest.approx((0.3, 0.4, 0.5, 0.6))

    def test_unknown_ones_are_none(self) -> None:
        _, verdict = verified(FakeImages(shown_by(FIRST)))
        assert (verdict.originals_before, verdict.originals_after, verdict.instead) == (None, None, None)


class TestLimits:
    def test_half_as_alike_as_before_is_a_copy(self) -> None:
        _, verdict = verified(FakeImages(lambda neurons, place: 0.48, before=(0.95, 0.95)))
        assert verdict.limits.remaining == pytest.approx(0.475)
        assert verdict.copies == 2

    @pytest.mark.parametrize(("diversity", "silenced"), [(0.64, True), (0.66, False)])
    def test_images_after_are_one_image_if_they_are_nearer_to_copies_than_to_ordinary_images(
        self, diversity: float, silenced: bool
    ) -> None:
        """Between τ_image = .4 and the copies' .9 lies .65."""
        images = FakeImages(shown_by(FIRST), diversity=lambda neurons: diversity, before=(0.9, 0.9))
        _, verdict = verified(images, stricter=0, budget=0)
        assert (verdict.trials[0].remaining, verdict.limits.diversity) == ((0.1, 0.1), pytest.approx(0.65))
        assert (len(verdict.trials) == 1) == silenced

    def test_prompt_whose_images_differ_from_the_start_has_nothing_to_silence(self) -> None:
        _, verdict = verified(FakeImages(lambda neurons, place: 0.3, before=(0.35, 0.3)))
        assert not verdict.replicated
        assert verdict.silenced


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def statistics(planted: Planted) -> ActivationStatistics:
    return collect_statistics(planted.pipe, planted.ordinary_prompts)


SAMPLING = Sampling(seeds=2, steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def threshold(planted: Planted) -> Threshold:
    return memorization_threshold(planted.pipe, planted.ordinary_prompts[:4], seeds=3, sampling=SAMPLING)


@pytest.fixture(scope="module")
def found(planted: Planted, statistics: ActivationStatistics, threshold: Threshold) -> Localization:
    return localize(
        planted.pipe,
        planted.memorized_prompt,
        statistics=statistics,
        threshold=threshold,
        seeds=3,
        verify=Verification(),
    )


class TestOnAPipeline:
    def test_result_survives_json(self, found: Localization) -> None:
        assert found.verdict is not None
        assert Localization.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found

    def test_certificate_has_the_verdict(self, found: Localization) -> None:
        assert found.certificate is not None
        assert found.verdict is not None
        assert found.certificate.verified == found.verified
        assert found.certificate.image_similarity == found.verdict.final.highest

    def test_images_count_as_samples(
        self, found: Localization, planted: Planted, statistics: ActivationStatistics, threshold: Threshold
    ) -> None:
        unverified = localize(
            planted.pipe, planted.memorized_prompt, statistics=statistics, threshold=threshold, seeds=3
        )
        assert found.verdict is not None
        assert unverified.verified is None
        assert found.unet_samples >= unverified.unet_samples + found.verdict.unet_samples
        assert found.verdict.unet_samples == 2 * SAMPLING.steps * (1 + len(found.verdict.trials))

    def test_images_are_written_with_the_result(
        self, tmp_path: Path, planted: Planted, statistics: ActivationStatistics, threshold: Threshold
    ) -> None:
        localizer = Localizer(planted.pipe, statistics=statistics, threshold=threshold, seeds=3, verify=Verification())
        prompts = [planted.ordinary_prompts[0], planted.memorized_prompt]
        found = localizer.localize_many(prompts, out=tmp_path)
        folder = ResultsFolder(tmp_path)
        assert read_results(tmp_path) == found
        for index, one in enumerate(found):
            assert list(folder.images(index, one.prompt, "before")) == [1, 2]
            assert list(folder.images(index, one.prompt, "after")) == ([1, 2] if one.memorized else [])

    def test_prompt_that_the_first_step_misses_is_found_by_its_images(
        self, planted: Planted, statistics: ActivationStatistics
    ) -> None:
        """No score is above τ = .9999, and any two images are alike enough for τ_image = -.5."""
        missed = localize(
            planted.pipe,
            planted.memorized_prompt,
            statistics=statistics,
            threshold=0.9999,
            seeds=3,
            verify=Verification(sampling=SAMPLING, threshold=-0.5, stricter=0, budget=0),
        )
        assert missed.score_before < 0.9999
        assert missed.memorized
        assert missed.missed_by_first_step
        assert missed.kept_seeds == (0, 1, 2)
        assert len(missed.neurons)

    def test_pipeline_is_as_before(self, planted: Planted, found: Localization) -> None:
        assert type(planted.pipe.scheduler).__name__ == "DDIMScheduler"
        assert planted.pipe._progress_bar_config == {"disable": True}

    def test_threshold_without_images_is_refused(self, planted: Planted, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="verification needs τ_image"):
            Localizer(planted.pipe, statistics=statistics, threshold=0.5, verify=Verification())

    def test_other_sampling_than_that_of_the_threshold_is_refused(
        self, planted: Planted, statistics: ActivationStatistics, threshold: Threshold
    ) -> None:
        verify = Verification(sampling=Sampling(seeds=2, steps=3, guidance=1.0))
        with pytest.raises(NemoError, match="τ_image was measured with steps 2, got 3"):
            Localizer(planted.pipe, statistics=statistics, threshold=threshold, seeds=3, verify=verify)

    def test_other_similarity_than_that_of_the_threshold_is_refused(
        self, planted: Planted, statistics: ActivationStatistics, threshold: Threshold
    ) -> None:
        class Other(PixelSimilarity):
            name = "another"

        verify = Verification(similarity=Other())
        with pytest.raises(NemoError, match=r"τ_image was measured with similarity pixels .*, got another"):
            Localizer(
                planted.pipe,
                statistics=statistics,
                threshold=threshold,
                seeds=3,
                verify=verify,
            )

    def test_results_with_another_verification_are_not_mixed(
        self, tmp_path: Path, planted: Planted, statistics: ActivationStatistics, threshold: Threshold
    ) -> None:
        prompts = planted.ordinary_prompts[:1]
        options = {"statistics": statistics, "threshold": threshold, "seeds": 3}
        Localizer(planted.pipe, **options).localize_many(prompts, out=tmp_path)  # type: ignore[arg-type]
        with pytest.raises(NemoError, match="results with another verification"):
            Localizer(planted.pipe, **options, verify=Verification()).localize_many(  # type: ignore[arg-type]
                prompts, out=tmp_path
            )
