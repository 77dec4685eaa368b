"""Scores: the protocol, noise differences, their similarity, the threshold, and the probe that counts."""

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from tiny_pipeline import DOWN_AND_MID, Planted, planted_pipeline, tiny_pipeline
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from nemo_ext import scoring
from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching import is_patched, patched, scaled_rows
from nemo_ext.scoring import (
    MemorizationScore,
    NoiseProbe,
    Protocol,
    Threshold,
    initial_latents,
    memorization_score,
    memorization_threshold,
    noise_differences,
    similarity,
    similarity_scales,
)
from nemo_ext.stages import Stages
from nemo_ext.statistics import encode_prompts

FIRST, *_, MID = DOWN_AND_MID
PROMPTS = ("a red cat", "a blue dog", "one boat")
PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()
# Of a similarity, where the U-Net has another number of rows: PyTorch then adds in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pipeline()


@pytest.fixture(scope="module")
def threshold(pipe: StableDiffusionPipeline) -> Threshold:
    return memorization_threshold(pipe, PROMPTS, seeds=3)


def scaled(difference: Tensor) -> Tensor:
    """Min-max scaling, one sample and channel after another."""
    planes = [(plane - plane.min()) / (plane.max() - plane.min()) for plane in difference.flatten(0, 1)]
    return torch.stack(planes).reshape(difference.shape)


class TestProtocol:
    def test_what_the_published_code_does_differently(self) -> None:
        paper, published = PAPER.to_dict(), PUBLISHED.to_dict()
        assert {name: (paper[name], published[name]) for name in paper if paper[name] != published[name]} == {
            "name": ("paper", "published-code"),
            "step_index": (0, 1),
            "seeds_share_generator": (False, True),
            "data_range": (1.0, None),
            "threshold_guidance": (0.0, 7.0),
            "tries_last_theta": (True, False),
            "keeps_duplicates": (False, True),
            "measures_floor": (True, False),
            "raise_margin": (0.01, 0.0),
        }

    @pytest.mark.parametrize("protocol", [PAPER, PUBLISHED, dataclasses.replace(PAPER, first_seed=7)])
    def test_round_trip(self, protocol: Protocol) -> None:
        assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol

    def test_by_name(self) -> None:
        assert Protocol.from_name("paper") == PAPER
        assert Protocol.from_name("published-code") == PUBLISHED
        with pytest.raises(NemoError, match="no protocol 'papers': wanted paper or published-code"):
            Protocol.from_name("papers")

    @pytest.mark.parametrize(
        ("field", "value"), [("step_index", 50), ("step_index", -1), ("data_range", 0), ("window_sigma", 0)]
    )
    def test_refuses_what_makes_no_sense(self, field: str, value: float) -> None:
        with pytest.raises(NemoError, match=f"{field} must be .* got {value}"):
            dataclasses.replace(PAPER, **{field: value})

    def test_refuses_unknown_fields(self) -> None:
        with pytest.raises(NemoError, match="a protocol has no field speed"):
            Protocol.from_dict({"speed": 1})


class TestInitialLatents:
    def test_paper_each_seed_is_that_of_any_diffusers_pipeline(self, pipe: StableDiffusionPipeline) -> None:
        latents = initial_latents(pipe, 3, PAPER)
        for place, seed in enumerate((1, 2, 3)):
            generator = torch.Generator().manual_seed(seed)
            assert torch.equal(latents[place : place + 1], randn_tensor((1, 4, 16, 16), generator=generator))

    def test_paper_more_seeds_begin_with_the_same_ones(self, pipe: StableDiffusionPipeline) -> None:
        assert torch.equal(initial_latents(pipe, 5, PAPER)[:3], initial_latents(pipe, 3, PAPER))

    def test_published_code_draws_all_seeds_from_one_generator(self, pipe: StableDiffusionPipeline) -> None:
        expected = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(initial_latents(pipe, 3, PUBLISHED), expected)

    def test_inpainting_models_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(in_channels=9)
        with pytest.raises(NemoError, match="takes 9 channels and predicts 4: wanted a text-to-image model"):
            initial_latents(pipe, 2, PAPER)


class TestNoiseDifferences:
    @pytest.mark.parametrize(("protocol", "timestep"), [(PAPER, 981), (PUBLISHED, 961)])
    def test_are_predicted_noise_minus_latents_scaled(
        self, pipe: StableDiffusionPipeline, protocol: Protocol, timestep: int
    ) -> None:
        hidden = encode_prompts(pipe, ["a cat"])
        latents = initial_latents(pipe, 3, protocol)
        with torch.no_grad():
            noise = pipe.unet(latents, timestep, encoder_hidden_states=hidden.repeat(3, 1, 1)).sample
        expected = scaled(noise - latents)
        torch.testing.assert_close(noise_differences(pipe, hidden, latents, protocol), expected, rtol=1e-5, atol=1e-5)

    def test_v_prediction_is_converted_to_noise(self) -> None:
        """Salimans and Ho: v = √ᾱ ε − √(1−ᾱ) x₀ and x = √ᾱ x₀ + √(1−ᾱ) ε, so ε = √ᾱ v + √(1−ᾱ) x."""
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        hidden, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 2, PAPER)
        with torch.no_grad():
            v = pipe.unet(latents, 981, encoder_hidden_states=hidden.repeat(2, 1, 1)).sample
        alpha = pipe.scheduler.alphas_cumprod[981]
        expected = scaled(alpha.sqrt() * v + (1 - alpha).sqrt() * latents - latents)
        torch.testing.assert_close(noise_differences(pipe, hidden, latents, PAPER), expected, rtol=1e-4, atol=1e-4)

    def test_batch_size_changes_rounding_only(self, pipe: StableDiffusionPipeline) -> None:
        hidden, latents = encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 5, PAPER)
        whole = noise_differences(pipe, hidden, latents, PAPER, batch_size=5)
        for batch_size in (1, 2):
            parts = noise_differences(pipe, hidden, latents, PAPER, batch_size=batch_size)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)

    def test_guidance_goes_towards_the_empty_prompt(self, pipe: StableDiffusionPipeline) -> None:
        """The published threshold script's formula, with its halves swapped: ε(y) + g (ε("") − ε(y))."""
        hidden, empty = encode_prompts(pipe, ["a cat"]), encode_prompts(pipe, [""])
        latents = initial_latents(pipe, 2, PUBLISHED)
        with torch.no_grad():
            conditional = pipe.unet(latents, 961, encoder_hidden_states=hidden.repeat(2, 1, 1)).sample
            unconditional = pipe.unet(latents, 961, encoder_hidden_states=empty.repeat(2, 1, 1)).sample
        expected = scaled(conditional + 7 * (unconditional - conditional) - latents)
        guided = noise_differences(pipe, hidden, latents, PUBLISHED, guidance=(7.0, empty))
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)

    def test_channel_without_any_difference_is_zero(self) -> None:
        pipe = tiny_pipeline()
        torch.nn.init.zeros_(pipe.unet.conv_out.weight)
        latents = torch.zeros(1, 4, 16, 16)
        assert noise_differences(pipe, encode_prompts(pipe, ["a"]), latents, PAPER).abs().max() == 0

    def test_leave_no_trace(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.train()
        random_state = torch.get_rng_state()
        difference = noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)
        assert not difference.requires_grad
        assert torch.equal(torch.get_rng_state(), random_state)
        assert pipe.unet.training
        assert pipe.scheduler.num_inference_steps is None

    def test_noise_that_is_not_finite_names_the_seed(self, pipe: StableDiffusionPipeline) -> None:
        latents = initial_latents(pipe, 3, PAPER)
        latents[1, 0, 0, 0] = float("inf")
        with pytest.raises(NemoError, match=r"noise for seed 1 \(counted from 0\) is not finite: use float32"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), latents, PAPER)

    def test_other_predictions_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
        with pytest.raises(NemoError, match="must be epsilon or v_prediction, got sample"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)

    def test_unets_that_want_more_than_text_are_refused(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(addition_embed_type="text_time")
        with pytest.raises(NemoError, match="addition_embed_type 'text_time', as in SDXL"):
            noise_differences(pipe, encode_prompts(pipe, ["a"]), initial_latents(pipe, 2, PAPER), PAPER)


def plain_ssim(a: numpy.ndarray, b: numpy.ndarray, data_range: float) -> tuple[float, float]:
    """Wang et al. 2004 in float64, window after window: SSIM and its contrast-structure part."""
    offsets = numpy.arange(-5, 6)
    line = numpy.exp(-(offsets**2) / (2 * 1.5**2))
    window = numpy.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    ssim, contrast = [], []
    for channel_a, channel_b in zip(a, b, strict=True):
        for row in range(a.shape[1] - 10):
            for column in range(a.shape[2] - 10):
                x = channel_a[row : row + 11, column : column + 11]
                y = channel_b[row : row + 11, column : column + 11]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                contrast.append((2 * cov + c2) / (vx + vy + c2))
                ssim.append(contrast[-1] * (2 * mx * my + c1) / (mx**2 + my**2 + c1))
    return float(numpy.mean(ssim)), float(numpy.mean(contrast))


def halved(a: numpy.ndarray) -> numpy.ndarray:
    """Means of 2×2 blocks; an odd last row or column is dropped."""
    rows, columns = a.shape[1] // 2 * 2, a.shape[2] // 2 * 2
    return a[:, :rows, :columns].reshape(a.shape[0], rows // 2, 2, columns // 2, 2).mean(axis=(2, 4))


def plain_similarity(a: numpy.ndarray, b: numpy.ndarray, scales: int, data_range: float) -> float:
    """The design's multi-scale similarity of one pair, in float64."""
    if scales == 1:
        return plain_ssim(a, b, data_range)[0]
    product, weight = 1.0, 0.33 if scales == 3 else 1 / scales
    for scale in range(scales):
        ssim, contrast = plain_ssim(a, b, data_range)
        product *= max(ssim if scale == scales - 1 else contrast, 0.0) ** weight
        a, b = halved(a), halved(b)
    return product


def alike(height: int, width: int, pairs: int = 3) -> tuple[Tensor, Tensor]:
    """Maps in [0, 1] that share more and more from pair to pair."""
    share = torch.linspace(0.2, 0.95, pairs).reshape(-1, 1, 1, 1)
    common = torch.rand(pairs, 2, height, width)
    return (share * common + (1 - share) * torch.rand_like(common) for _ in range(2))


class TestSimilarity:
    @pytest.mark.parametrize(
        ("size", "scales"), [(11, 1), (16, 1), (21, 1), (22, 2), (32, 2), (43, 2), (44, 3), (64, 3), (128, 3)]
    )
    def test_has_as_many_scales_as_the_window_fits(self, size: int, scales: int) -> None:
        assert similarity_scales(size, size) == scales
        assert similarity_scales(size, 128) == similarity_scales(128, size) == scales

    def test_latents_smaller_than_the_window_are_refused(self) -> None:
        with pytest.raises(NemoError, match=r"latents of 10x64 are smaller than the similarity's window of 11x11"):
            similarity_scales(10, 64)
        assert similarity_scales(10, 64, window_sigma=1.0) == 1

    @pytest.mark.parametrize(("height", "width", "scales"), [(16, 17, 1), (23, 32, 2), (45, 47, 3)])
    def test_is_the_plain_formula_in_float64(self, height: int, width: int, scales: int) -> None:
        a, b = alike(height, width)
        expected = [
            plain_similarity(x, y, scales, 1.0) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
        numpy.testing.assert_allclose(similarity(a, b, PAPER), expected, rtol=1e-4, atol=1e-5)

    def test_one_scale_is_torchmetrics_without_its_border(self) -> None:
        a, b = alike(16, 16)
        _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
        inner = full[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
        torch.testing.assert_close(similarity(a, b, PAPER), inner, rtol=1e-4, atol=1e-5)

    def test_of_equal_maps_is_1(self) -> None:
        for size in (16, 32, 64):
            a = torch.rand(2, 4, size, size)
            torch.testing.assert_close(similarity(a, a, PAPER), torch.ones(2))
            torch.testing.assert_close(similarity(a, a, PUBLISHED), torch.ones(2))
            constant = torch.zeros(1, 1, size, size)
            assert similarity(constant, constant, PUBLISHED).item() == 1

    def test_paper_a_pair_does_not_depend_on_the_others(self) -> None:
        a, b = alike(64, 64)
        torch.testing.assert_close(similarity(a, b, PAPER)[1:2], similarity(a[1:2], b[1:2], PAPER))

    def test_published_code_infers_the_range_from_all_pairs_at_every_scale(self) -> None:
        a, b = alike(64, 64)
        together, alone = similarity(a, b, PUBLISHED)[1], similarity(a[1:2], b[1:2], PUBLISHED)[0]
        assert (together - alone).abs() > 1e-5
        expected, weight = torch.ones(3, dtype=torch.float64), 0.33
        x, y = a, b
        for scale in range(3):
            data_range = max((x.max() - x.min()).item(), (y.max() - y.min()).item())
            terms = [plain_ssim(p, q, data_range) for p, q in zip(x.double().numpy(), y.double().numpy(), strict=True)]
            expected *= torch.tensor([ssim if scale == 2 else contrast for ssim, contrast in terms]) ** weight
            x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
        # At the coarsest scale the first pair has 0.015, of which rounding by 5e-6 is 3e-4.
        numpy.testing.assert_allclose(similarity(a, b, PUBLISHED), expected, rtol=1e-3, atol=1e-5)


class TestMemorizationScore:
    def test_of_a_seed_is_its_highest_similarity_with_another(self, pipe: StableDiffusionPipeline) -> None:
        score = memorization_score(pipe, "a cat", seeds=4)
        difference = noise_differences(pipe, encode_prompts(pipe, ["a cat"]), initial_latents(pipe, 4, PAPER), PAPER)
        for s in range(4):
            others = [similarity(difference[[s]], difference[[r]], PAPER).item() for r in range(4) if r != s]
            assert score.per_seed[s] == pytest.approx(max(others), abs=1e-5)
        assert score.max == max(score.per_seed)
        assert torch.equal(score.pairs, score.pairs.T)
        assert torch.equal(score.pairs.diagonal(), torch.ones(4, dtype=torch.float64))

    def test_is_high_for_the_memorized_prompt_alone(self, planted: Planted) -> None:
        assert memorization_score(planted.pipe, planted.memorized_prompt, seeds=3).max > 0.9
        assert memorization_score(planted.pipe, planted.ordinary_prompts[0], seeds=3).max < 0.3

    def test_measures_a_patched_pipeline_as_it_is(self, planted: Planted) -> None:
        with patched(planted.pipe, planted.neurons):
            assert memorization_score(planted.pipe, planted.memorized_prompt, seeds=3).max < 0.3

    def test_wants_two_seeds(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="a score compares seeds: wanted 2 or more, got 1"):
            memorization_score(pipe, "a cat", seeds=1)


class TestThreshold:
    def test_is_the_mean_plus_one_unbiased_std_of_the_scores(
        self, pipe: StableDiffusionPipeline, threshold: Threshold
    ) -> None:
        scores = [memorization_score(pipe, prompt, seeds=3).max for prompt in PROMPTS]
        assert threshold.scores == tuple(scores)
        assert float(threshold) == pytest.approx(numpy.mean(scores) + numpy.std(scores, ddof=1))
        assert (threshold.seeds, threshold.protocol) == (3, PAPER)

    def test_published_code_measures_it_with_guidance(self, pipe: StableDiffusionPipeline) -> None:
        guided = memorization_threshold(pipe, PROMPTS, seeds=3, protocol=PUBLISHED)
        without = dataclasses.replace(PUBLISHED, threshold_guidance=0.0)
        assert guided.scores != memorization_threshold(pipe, PROMPTS, seeds=3, protocol=without).scores

    def test_wants_two_prompts(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="needs two prompts or more, got 1"):
            memorization_threshold(pipe, ["a cat"])

    def test_round_trip(self, tmp_path: Path, threshold: Threshold) -> None:
        threshold.save(tmp_path / "threshold.json")
        assert Threshold.load(tmp_path / "threshold.json") == threshold
        assert [file.name for file in tmp_path.iterdir()] == ["threshold.json"]

    @pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"protocol": {}, "scores": []}'])
    def test_other_files_are_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(NemoError, match=r"t\.json does not hold a threshold"):
            Threshold.load(tmp_path / "t.json")

    def test_holds_for_its_model_protocol_and_number_of_seeds_only(
        self, pipe: StableDiffusionPipeline, threshold: Threshold
    ) -> None:
        threshold.check(pipe, dataclasses.replace(PAPER, first_seed=9, first_theta=4.0), seeds=3)
        with pytest.raises(NemoError, match="measured with seeds 3, got 10"):
            threshold.check(pipe, PAPER, seeds=10)
        with pytest.raises(NemoError, match="measured with step_index 0, got 1"):
            threshold.check(pipe, PUBLISHED, seeds=3)
        with pytest.raises(NemoError, match="measured on another model"):
            threshold.check(tiny_pipeline(seed=1), PAPER, seeds=3)


class TestNoiseProbe:
    @staticmethod
    def probe(planted: Planted, seeds: int = 3) -> NoiseProbe:
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        return NoiseProbe(planted.pipe, hidden, seeds=seeds, protocol=PAPER)

    def test_remaining_is_the_highest_similarity_to_the_untouched_model(self, planted: Planted) -> None:
        some = NeuronSet({MID: [31], FIRST: [7]})
        probe = self.probe(planted)
        remaining, untouched = probe.remaining(some), probe.untouched
        with patched(planted.pipe, some):
            blocked = noise_differences(planted.pipe, probe.hidden, probe.latents, PAPER)
        assert remaining == pytest.approx(similarity(untouched, blocked, PAPER).max().item(), abs=1e-6)

    def test_leaves_the_pipeline_as_it_was(self, planted: Planted) -> None:
        self.probe(planted).remaining(planted.neurons)
        assert not is_patched(planted.pipe)
        with patched(planted.pipe):
            assert self.probe(planted).remaining(planted.neurons) < 0.3
            assert self.probe(planted).remaining(planted.decoys) > 0.9

    def test_no_neurons_remain_whole_without_an_evaluation(self, planted: Planted) -> None:
        probe = self.probe(planted)
        assert probe.remaining(NeuronSet()) == 1
        assert probe.unet_samples == 0

    def test_counts_every_latent_and_asks_for_no_set_twice(self, planted: Planted) -> None:
        probe = self.probe(planted, seeds=3)
        probe.score()
        assert probe.unet_samples == 3
        first = probe.remaining(planted.neurons)
        assert probe.unet_samples == 6
        assert probe.remaining(planted.neurons) == first
        assert probe.unet_samples == 6

    def test_counts_guidance_twice(self, planted: Planted) -> None:
        hidden = encode_prompts(planted.pipe, ["a", ""])
        probe = NoiseProbe(planted.pipe, hidden[:1], seeds=3, protocol=PAPER, guidance=(7.0, hidden[1:]))
        probe.score()
        assert probe.unet_samples == 6

    def test_only_kept_seeds_are_evaluated_and_compared(
        self, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs = torch.eye(4, dtype=torch.float64)
        for (first, second), value in {(0, 1): 0.5, (0, 2): 0.75, (1, 3): 0.25}.items():
            pairs[first, second] = pairs[second, first] = value
        monkeypatch.setattr(NoiseProbe, "score", lambda self: MemorizationScore(pairs))
        probe = self.probe(planted, seeds=4)
        assert probe.score().per_seed == (0.75, 0.5, 0.75, 0.25)
        assert probe.keep_above(0.5) == (0, 2)
        probe.remaining(planted.neurons)
        assert probe.unet_samples == 4 + 2

    def test_without_a_kept_seed_nothing_can_remain(self, planted: Planted) -> None:
        probe = self.probe(planted)
        assert probe.keep_above(1.0) == ()
        with pytest.raises(NemoError, match="no seed is kept"):
            probe.remaining(planted.neurons)

    @pytest.mark.parametrize("seed", range(30))
    def test_stopping_early_decides_as_the_maximum_does(
        self, planted: Planted, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On random similarities, asked in any order, with thresholds that are some seed's similarity exactly."""
        rng = random.Random(seed)
        probe = self.probe(planted, seeds=5)
        sets = [NeuronSet({MID: [index]}) for index in range(12)]
        table = {neurons: [rng.randrange(8) / 8 for _ in range(5)] for neurons in sets}
        evaluated: list[tuple[int, NeuronSet]] = []

        def evaluate(wanted: list[tuple[int, NeuronSet]], ahead: list[tuple[int, NeuronSet]], limit: float) -> None:
            for seed, neurons in wanted + ahead[: rng.randrange(3)]:
                evaluated.append((seed, neurons))
                probe._remembered.setdefault(neurons, {})[seed] = table[neurons][seed]

        monkeypatch.setattr(probe, "_evaluate", evaluate)
        for neurons in rng.choices(sets, k=40):
            threshold = rng.randrange(9) / 8
            exact = max(table[neurons])
            ahead = rng.sample([other for other in sets if other != neurons], 2)
            assert (probe.remaining(neurons, enough=threshold, ahead=ahead) <= threshold) == (exact <= threshold)
            below = math.nextafter(threshold, -math.inf)
            assert (probe.remaining(neurons, enough=below, ahead=ahead) < threshold) == (exact < threshold)
            assert probe.remaining(neurons, enough=threshold) <= exact
            if rng.random() < 0.3:
                assert probe.remaining(neurons) == exact
        assert len(set(evaluated)) == len(evaluated)

    def test_the_seed_that_was_highest_last_is_evaluated_first(
        self, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probe = self.probe(planted, seeds=4)
        calls: list[list[int]] = []

        def evaluate(wanted: list[tuple[int, NeuronSet]], ahead: list[tuple[int, NeuronSet]], limit: float) -> None:
            calls.append([seed for seed, _ in wanted])
            for seed, neurons in wanted:
                probe._remembered[neurons][seed] = 0.9 if seed == 2 else 0.1

        monkeypatch.setattr(probe, "_evaluate", evaluate)
        for index in range(3):
            assert probe.remaining(NeuronSet({MID: [index]}), enough=0.5) == 0.9
        assert calls == [[0], [1, 2, 3], [2], [2]]
        assert probe.likeliest() == (2,)

    def test_a_trial_ahead_takes_what_room_a_batch_has_and_is_not_evaluated_again(self, planted: Planted) -> None:
        """Three seeds in batches of two leave room for one more row, whose neurons are others."""
        sets = [planted.decoys, planted.neurons, NeuronSet({MID: [0]})]
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        probe, alone = (NoiseProbe(planted.pipe, hidden, seeds=3, protocol=PAPER, batch_size=size) for size in (2, 1))
        first = probe.remaining(sets[0], ahead=sets[1:])
        assert probe.unet_samples == 3 + 3 + 1
        second = probe.remaining(sets[1])
        assert probe.unet_samples == 3 + 3 + 3
        assert [first, second] == pytest.approx([alone.remaining(one, ahead=sets) for one in sets[:2]], abs=ROUNDING)
        assert second < 0.3 < 0.9 < first
        assert alone.unet_samples == 3 + 3 + 3

    def test_a_set_that_is_named_ahead_of_itself_or_twice_is_evaluated_once(self, planted: Planted) -> None:
        probe = self.probe(planted)
        one, other = NeuronSet({MID: [0]}), NeuronSet({MID: [1]})
        probe.remaining(one, enough=-1.0, ahead=[one, other, other, NeuronSet()])
        assert probe.unet_samples == 3 + 2

    def test_a_trial_ahead_joins_only_where_it_can_enter_the_unet(self, planted: Planted) -> None:
        """What is asked for enters at the last layer; a set of the first one has to begin before that."""
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        with patched(planted.pipe):
            stages = Stages.of(planted.pipe.unet, list(DOWN_AND_MID), hidden)
            assert stages is not None
            probe = NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER, stages=stages)
            share = stages.shares[stages.layers.index(MID)]
            probe.score()
            for index, ahead, rows in ((0, {FIRST: [0]}, 1), (1, {MID: [8]}, 2)):
                before = probe.unet_samples
                probe.remaining(NeuronSet({MID: [index]}), enough=-1.0, ahead=[NeuronSet(ahead)])
                assert probe.unet_samples - before == pytest.approx(rows * share)

    def test_entering_late_changes_nothing_but_the_cost(self, planted: Planted) -> None:
        rng = random.Random(0)
        layers = list(DOWN_AND_MID)
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        with patched(planted.pipe):
            whole = NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER)
            stages = Stages.of(planted.pipe.unet, layers, hidden)
            late = NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER, stages=stages)
            assert torch.equal(late.untouched, whole.untouched)
            for _ in range(12):
                neurons = NeuronSet({layer: [rng.randrange(16)] for layer in rng.sample(layers, 2)})
                assert late.remaining(neurons) == pytest.approx(whole.remaining(neurons), abs=1e-6)
        assert late.unet_samples < 0.9 * whole.unet_samples

    def test_neurons_of_layers_without_an_entry_are_not_taken_for_none(self, planted: Planted) -> None:
        """The search's only layer is the last one; a neuron before it changes what comes in there."""
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        with patched(planted.pipe):
            stages = Stages.of(planted.pipe.unet, [MID], hidden)
            probes = [NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER, stages=s) for s in (stages, None)]
            late, whole = ([probe.untouched, probe.remaining(planted.neurons)][1] for probe in probes)
        assert late == pytest.approx(whole, abs=1e-6)

    @pytest.mark.parametrize("held", [0, 2])
    def test_memory_for_earlier_runs_changes_the_cost_alone(
        self, planted: Planted, held: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hidden = encode_prompts(planted.pipe, [planted.memorized_prompt])
        with patched(planted.pipe):
            stages = Stages.of(planted.pipe.unet, list(DOWN_AND_MID), hidden)
            assert stages is not None
            monkeypatch.setattr(scoring, "HELD_BYTES", held * 2 * stages.row_bytes)
            probe = NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER, stages=stages)
            sets = [NeuronSet({MID: [index]}) for index in (0, 30, 31)]
            remaining = [probe.score().max, *map(probe.remaining, sets)]
            expected = NoiseProbe(planted.pipe, hidden, seeds=2, protocol=PAPER)
            assert remaining == pytest.approx([expected.score().max, *map(expected.remaining, sets)], abs=1e-6)
        assert (probe.unet_samples == expected.unet_samples) == (held == 0)

    def test_the_batch_is_what_memory_allows_and_at_most_a_latent_for_each_seed(
        self, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for fitting, batch_size in ((1, 1), (2, 2), (100, 3)):
            monkeypatch.setattr(scoring, "rows_that_fit", lambda unet, hidden, fitting=fitting: fitting)
            assert self.probe(planted).batch_size == batch_size

    def test_effects_are_the_slope_of_the_similarity_at_half(self, planted: Planted) -> None:
        probe = self.probe(planted, seeds=2)
        layers = list(DOWN_AND_MID)
        effects = probe.effects(layers, [1])
        assert probe.unet_samples == 2 + 3
        half = {layer: torch.full((1, width), 0.5) for layer, width in DOWN_AND_MID.items()}
        step = 1e-2
        for layer, index in list(planted.neurons.pairs())[:2]:
            values = []
            for sign in (-1, 1):
                half[layer][0, index] = 0.5 + sign * step
                with patched(planted.pipe), scaled_rows(planted.pipe, half):
                    delta = noise_differences(planted.pipe, probe.hidden, probe.latents[[1]], PAPER)
                values.append(similarity(probe.untouched[[1]], delta, PAPER).item())
            half[layer][0, index] = 0.5
            slope = (values[1] - values[0]) / (2 * step)
            assert effects[layer][index].item() == pytest.approx(slope, rel=0.05, abs=1e-4)

    def test_effects_leave_no_gradient_behind(self, planted: Planted) -> None:
        probe = self.probe(planted, seeds=2)
        effects = probe.effects([MID], [0, 1])
        assert {layer: (list(values.shape), values.requires_grad) for layer, values in effects.items()} == {
            MID: ([DOWN_AND_MID[MID]], False)
        }
        assert all(parameter.grad is None for parameter in planted.pipe.unet.parameters())
        assert not is_patched(planted.pipe)

    def test_too_small_latents_are_refused_before_the_unet_is_evaluated(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(sample_size=8)
        with pytest.raises(NemoError, match="latents of 8x8 are smaller"):
            NoiseProbe(pipe, encode_prompts(pipe, ["a"]), protocol=PAPER)
