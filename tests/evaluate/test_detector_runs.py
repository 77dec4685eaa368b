"""Each detector of memorized prompts, against a computation of its own, and what it needs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from made_up_family import MEMORIZED, ORDINARY, SignPipeline, Signs, sign_pipeline
from tiny_pipeline import planted_pipeline, tiny_pipeline
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.detector_runs import DetectorRuns
from nemo_ext.evaluate.detectors import (
    ANISOTROPY,
    DETECTORS,
    FIRST_MAGNITUDE,
    GUIDANCE_ALIGNMENT,
    LAYER_ENTROPY,
    MEAN_ENTROPY,
    MEAN_MAGNITUDE,
    NEMO,
    Z_SCORE,
    Detector,
)
from nemo_ext.measure.activations import prompt_activations
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.models.registry import FAMILIES
from nemo_ext.models.stable_diffusion import StableDiffusion
from nemo_ext.models.text import encode_prompts
from nemo_ext.patching.patch import patched

SEEDS, STEPS, GUIDANCE = 2, 2, 3.0
PROMPT = "a cat"
HOLDOUT = ("one", "a red boat", "rain", "three birds")
#: The first timestep, and the third last one, of a 50-step DDIM schedule with an offset of 1.
FIRST, LATE = 981, 41


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def statistics(pipe: StableDiffusionPipeline) -> ActivationStatistics:
    return collect_statistics(pipe, HOLDOUT)


def runs_of(pipe: Any, **options: Any) -> DetectorRuns:
    given: dict[str, Any] = {
        "statistics": None,
        "protocol": Protocol.paper(),
        "seeds": SEEDS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "batch_size": 4,
    }
    return DetectorRuns(pipe, **{**given, **options})


@pytest.fixture(scope="module")
def scores(pipe: StableDiffusionPipeline, statistics: ActivationStatistics) -> dict[Detector, float]:
    return runs_of(pipe, statistics=statistics).scores(PROMPT)


def start() -> Tensor:
    """x_T of seeds 1 and 2, as any diffusers pipeline draws it."""
    return torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])


def predicted(pipe: StableDiffusionPipeline, timestep: int, prompt: str) -> list[Tensor]:
    """The U-Net's output of each seed, one call after another."""
    hidden = encode_prompts(pipe, [prompt]).hidden
    with torch.no_grad():
        return [pipe.unet(x, timestep, encoder_hidden_states=hidden).sample[0] for x in start().split(1)]


def magnitude(pipe: StableDiffusionPipeline, prompt: str) -> float:
    pairs = zip(predicted(pipe, FIRST, prompt), predicted(pipe, FIRST, ""), strict=True)
    return sum(math.sqrt(((text - empty) ** 2).sum().item()) for text, empty in pairs) / SEEDS


def alignment(pipe: StableDiffusionPipeline, prompt: str) -> float:
    cosines = []
    for text, empty in zip(predicted(pipe, LATE, prompt), predicted(pipe, LATE, ""), strict=True):
        guidance = text - empty
        cosines.append(((empty * guidance).sum(0) / ((empty**2).sum(0).sqrt() * (guidance**2).sum(0).sqrt())).mean())
    return sum(cosine.item() for cosine in cosines) / SEEDS


def magnitudes_of_a_generation(pipe: StableDiffusionPipeline, prompt: str, steps: int) -> float:
    """The mean over the steps and seeds of the pipeline's own guided generation, observed at the U-Net's output."""
    norms: list[Tensor] = []

    def observe(_: Any, arguments: Any, output: Any) -> None:
        unconditional, conditional = output[0].chunk(2)
        difference = conditional - unconditional
        if pipe.scheduler.config.prediction_type == "v_prediction":
            difference = difference * pipe.scheduler.alphas_cumprod[int(arguments[1])].sqrt()
        norms.append(difference.flatten(1).norm(dim=1))

    hook = pipe.unet.register_forward_hook(observe)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pipe([prompt] * 2, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, output_type="latent")
    hook.remove()
    assert len(norms) == steps
    return torch.stack(norms).mean().item()


class Probabilities(AttnProcessor):
    """diffusers' processor with plain matrix products, which shows the probabilities of each head and position."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, attn: Any, *arguments: Any, **options: Any) -> Tensor:
        scored = type(attn).get_attention_scores

        def observed(*operands: Any) -> Tensor:
            probabilities: Tensor = scored(attn, *operands)
            self.seen.append(probabilities)
            return probabilities

        attn.get_attention_scores = observed
        try:
            output: Tensor = super().__call__(attn, *arguments, **options)
        finally:
            del attn.get_attention_scores
        return output


def attention_of_each_layer(prompt: str) -> Tensor:
    """The mean attention of each token in each cross-attention for each seed, [7, S, T], on a pipeline of its own."""
    pipe = tiny_pipeline()
    processors = {name: Probabilities() for name, _ in pipe.unet.named_modules() if name.endswith("attn2")}
    for name, processor in processors.items():
        pipe.unet.get_submodule(name).set_processor(processor)
    predicted(pipe, FIRST, prompt)
    in_order = sorted(processors)  # the down blocks before the mid block
    return torch.stack([torch.stack([seen.mean((0, 1)) for seen in processors[name].seen]) for name in in_order])


def entropy(attention: Tensor) -> float:
    return -(attention * attention.log()).sum(-1).mean().item()


class TestScores:
    def test_of_nemo_is_the_memorization_score(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        assert scores[NEMO] == pytest.approx(memorization_score(pipe, PROMPT, seeds=SEEDS).max, abs=1e-5)

    def test_of_the_first_step_is_the_norm_of_the_text_conditional_noise(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        assert scores[FIRST_MAGNITUDE] == pytest.approx(magnitude(pipe, PROMPT), rel=1e-4)

    def test_of_all_steps_is_that_of_the_pipelines_own_generation(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        assert scores[MEAN_MAGNITUDE] == pytest.approx(magnitudes_of_a_generation(pipe, PROMPT, STEPS), rel=1e-4)

    def test_of_all_steps_with_v_prediction_is_the_norm_of_noise(self) -> None:
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        expected = magnitudes_of_a_generation(pipe, PROMPT, STEPS)
        assert runs_of(pipe).scores(PROMPT)[MEAN_MAGNITUDE] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("step_index", [0, 1])
    def test_of_all_steps_shares_the_first_prediction_if_the_schedules_are_the_same(
        self, pipe: StableDiffusionPipeline, step_index: int
    ) -> None:
        """The prediction of another step of the protocol is made with the initial latents, so it is not shared."""
        protocol = replace(Protocol.paper(), num_inference_steps=3, step_index=step_index)
        runs = runs_of(pipe, protocol=protocol, steps=3)
        before = runs.samples
        assert runs.scores(PROMPT)[MEAN_MAGNITUDE] == pytest.approx(
            magnitudes_of_a_generation(tiny_pipeline(), PROMPT, 3), rel=1e-4
        )
        # The protocol's step, the late step, and two halves of each further step of the generation.
        samples = 1 + 1 + 2 * 2
        if step_index == 1:  # also both halves of the generation's first step
            samples += 2
        assert runs.samples - before == SEEDS * samples

    def test_of_the_fourth_layer_is_the_entropy_of_its_attention_over_tokens(
        self, scores: dict[Detector, float]
    ) -> None:
        assert scores[LAYER_ENTROPY] == pytest.approx(entropy(attention_of_each_layer(PROMPT)[3]), rel=1e-5)

    def test_of_all_layers_is_the_entropy_of_their_mean_attention(self, scores: dict[Detector, float]) -> None:
        assert scores[MEAN_ENTROPY] == pytest.approx(entropy(attention_of_each_layer(PROMPT).mean(0)), rel=1e-5)

    def test_of_alignment_is_the_cosine_at_each_latent_position_of_a_late_step(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        assert scores[GUIDANCE_ALIGNMENT] == pytest.approx(alignment(pipe, PROMPT), abs=1e-4)

    def test_of_anisotropy_is_the_magnitude_plus_twice_the_alignment(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        expected = magnitude(pipe, PROMPT) + 2 * alignment(pipe, PROMPT)
        assert scores[ANISOTROPY] == pytest.approx(expected, abs=3e-4)

    def test_of_activations_is_the_largest_z_score_of_the_statistics_layers(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        ordinary = {layer: a.double() for layer, a in prompt_activations(pipe, HOLDOUT).items()}
        z = [
            ((a[0] - ordinary[layer].mean(0)).abs() / ordinary[layer].std(0)).max().item()
            for layer, a in prompt_activations(pipe, [PROMPT]).items()
        ]
        assert scores[Z_SCORE] == pytest.approx(max(z), rel=1e-3)

    def test_do_not_depend_on_the_batch_size(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        for detector, score in runs_of(pipe, batch_size=1).scores(PROMPT).items():
            assert score == pytest.approx(scores[detector], abs=1e-4)

    def test_do_not_depend_on_the_prompts_before(
        self, pipe: StableDiffusionPipeline, scores: dict[Detector, float]
    ) -> None:
        runs = runs_of(pipe)
        other, one = runs.scores("two dogs"), runs.scores(PROMPT)
        for detector, score in one.items():
            assert score == pytest.approx(scores[detector], abs=1e-5)
            assert score != other[detector]

    def test_in_bfloat16_are_those_of_float32_up_to_rounding(self, scores: dict[Detector, float]) -> None:
        rounded = runs_of(tiny_pipeline().to(torch.bfloat16)).scores(PROMPT)
        for detector in (NEMO, FIRST_MAGNITUDE, MEAN_MAGNITUDE, LAYER_ENTROPY, MEAN_ENTROPY):
            assert rounded[detector] == pytest.approx(scores[detector], rel=0.1)

    def test_are_those_of_evaluation_mode(self, scores: dict[Detector, float]) -> None:
        pipe = tiny_pipeline()
        pipe.unet.train()
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        for detector, score in runs_of(pipe).scores(PROMPT).items():
            assert score == pytest.approx(scores[detector], abs=1e-5)

    def test_of_a_patched_pipeline_are_measured_as_it_is(self) -> None:
        planted = planted_pipeline()
        assert runs_of(planted.pipe, steps=1).scores(planted.memorized_prompt)[NEMO] > 0.9
        with patched(planted.pipe, planted.neurons):
            assert runs_of(planted.pipe, steps=1).scores(planted.memorized_prompt)[NEMO] < 0.3

    def test_that_are_not_finite_are_refused(self) -> None:
        pipe = tiny_pipeline()
        torch.nn.init.constant_(pipe.unet.conv_out.bias, math.inf)
        with pytest.raises(NemoError, match=r"noise is not finite: use float32 or bfloat16 instead of torch\.float32"):
            runs_of(pipe)


def test_the_pipeline_and_the_state_of_torch_stay_as_they_were() -> None:
    pipe = tiny_pipeline()
    pipe.unet.train()
    statistics = collect_statistics(pipe, HOLDOUT)
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    random_state, scheduler = torch.get_rng_state(), dict(pipe.scheduler.config)
    runs_of(pipe, statistics=statistics).scores(PROMPT)
    assert pipe.unet.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(pipe.scheduler.config) == scheduler
    assert pipe.scheduler.num_inference_steps is None
    assert pipe.unet.attn_processors == processors
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


class TestUnetSamples:
    def test_of_each_detector_alone_count_both_halves_of_guidance(self, pipe: StableDiffusionPipeline) -> None:
        assert runs_of(pipe).samples_alone() == {
            NEMO: SEEDS,
            FIRST_MAGNITUDE: 2 * SEEDS,
            MEAN_MAGNITUDE: 2 * SEEDS * STEPS,
            LAYER_ENTROPY: SEEDS,
            MEAN_ENTROPY: SEEDS,
            ANISOTROPY: 4 * SEEDS,
            GUIDANCE_ALIGNMENT: 2 * SEEDS,
            Z_SCORE: 0,
        }

    def test_of_all_detectors_together_are_those_that_the_denoiser_evaluates(self) -> None:
        pipe = tiny_pipeline()
        rows: list[int] = []
        pipe.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
        runs = runs_of(pipe)
        for prompt in (PROMPT, "two dogs"):
            runs.scores(prompt)
        assert runs.samples == sum(rows)
        # For each prompt: 1 early, 1 late, and the steps with 2, but the first one with 1. Then 3 for all prompts.
        assert sum(rows) == SEEDS * (2 * (2 + 2 * STEPS - 1) + 3)


class TestUnavailable:
    def test_without_statistics_are_z_scores_alone(self, pipe: StableDiffusionPipeline) -> None:
        assert runs_of(pipe).unavailable == {
            Z_SCORE: "it needs activation statistics: give the result of collect_statistics"
        }

    def test_with_one_seed_is_nemo(self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics) -> None:
        assert runs_of(pipe, statistics=statistics, seeds=1).unavailable == {
            NEMO: "a score compares seeds: wanted 2 or more, got 1"
        }

    def test_with_a_short_schedule_is_the_late_step(self, pipe: StableDiffusionPipeline) -> None:
        found = runs_of(pipe, protocol=replace(Protocol.paper(), num_inference_steps=2)).unavailable
        assert set(found) == {Z_SCORE, ANISOTROPY, GUIDANCE_ALIGNMENT}
        assert found[GUIDANCE_ALIGNMENT] == "it needs a schedule of 3 steps or more: the protocol has 2"

    def test_with_another_scheduler_is_the_generation(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(StableDiffusion, "sampling_scheduler", lambda *_: FlowMatchEulerDiscreteScheduler())
            found = runs_of(pipe).unavailable
        assert found[MEAN_MAGNITUDE].startswith("FlowMatchEulerDiscreteScheduler does not step with predicted noise")

    def test_with_fused_projections_are_the_entropies_alone(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.fuse_qkv_projections()
        runs = runs_of(pipe)
        assert set(runs.unavailable) == {Z_SCORE, LAYER_ENTROPY, MEAN_ENTROPY}
        assert runs.unavailable[MEAN_ENTROPY].startswith("the attention of down_blocks.0.attentions.0")
        assert set(runs.scores(PROMPT)) == set(DETECTORS) - set(runs.unavailable)


class TestMadeUpFamily:
    @pytest.fixture(autouse=True)
    def _signs(self) -> Iterator[None]:
        FAMILIES.append(Signs())
        yield
        FAMILIES.pop()

    def test_its_memorized_text_has_the_highest_scores(self) -> None:
        pipe = sign_pipeline()
        runs = runs_of(pipe, statistics=collect_statistics(pipe, ORDINARY[:6]))
        memorized, ordinary = runs.scores(MEMORIZED), [runs.scores(text) for text in ORDINARY[6:]]
        for detector in (NEMO, FIRST_MAGNITUDE, MEAN_MAGNITUDE, Z_SCORE):
            assert memorized[detector] > 1.5 * max(scores[detector] for scores in ordinary)

    def test_what_it_lacks_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def without_default(self: SignPipeline, prompts: list[str], guidance_scale: float) -> None: ...

        monkeypatch.setattr(SignPipeline, "__call__", without_default)
        found = runs_of(sign_pipeline(), guidance=None).unavailable
        assert set(found) == {Z_SCORE, MEAN_MAGNITUDE, LAYER_ENTROPY}
        assert found[MEAN_MAGNITUDE] == "SignPipeline has no default for guidance_scale: give the guidance as a number"
        assert found[LAYER_ENTROPY] == "it reads the fourth cross-attention, and the denoiser has 2"

    def test_compiled_it_has_the_same_scores_from_calls_of_one_size(self) -> None:
        plain, compiled = sign_pipeline(), sign_pipeline()
        compiled.painter.compile(backend="eager")
        expected = runs_of(plain, seeds=3, batch_size=2).scores(MEMORIZED)
        runs = runs_of(compiled, seeds=3, batch_size=2)
        assert runs.scores(MEMORIZED) == pytest.approx(expected, rel=1e-5)
        # Two predictions record attention, so they run eagerly. The other six, of 3 seeds, are two calls with 2 rows.
        assert runs.samples == 2 * 3 + 6 * 4

    def test_recording_attention_compiles_nothing(self) -> None:
        compilations: list[Any] = []

        def backend(graph: Any, _: Any) -> Any:
            compilations.append(graph)
            return graph.forward

        torch.compiler.reset()
        pipe = sign_pipeline()
        pipe.painter.compile(backend=backend)
        runs = runs_of(pipe)  # predicts the noise of the empty prompt while attention is recorded
        assert not compilations
        runs.scores(MEMORIZED)
        assert len(compilations) == 1
