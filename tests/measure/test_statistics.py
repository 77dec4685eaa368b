"""Activation statistics: against NumPy in float64, merged, saved, and refused where they don't fit."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import DOWN_AND_MID, TEXT_WIDTH, TOKENS, tiny_pipeline

from nemo_ext import ops
from nemo_ext.demo.run import load_demo_pipeline
from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import ValueStack, accelerated_linears, prompt_activations
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.models.layers import value_layers
from nemo_ext.models.text import encode_prompts
from nemo_ext.patching.patch import patched

FIRST, SECOND, *_, MID = DOWN_AND_MID
PROMPTS = tuple(f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "boat"))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def statistics(pipe: StableDiffusionPipeline) -> ActivationStatistics:
    return collect_statistics(pipe, PROMPTS)


def activations_by_hand(pipe: StableDiffusionPipeline, layer: str) -> numpy.ndarray:
    """Section 3.1 in NumPy and float64: the mean over tokens of |e Wᵀ|, prompt by prompt."""
    weight = pipe.unet.get_submodule(layer).weight.detach().double().numpy()
    rows = []
    for prompt in PROMPTS:
        hidden = encode_prompts(pipe, [prompt]).hidden[0].double().numpy()
        rows.append(numpy.abs(hidden @ weight.T).mean(axis=0))
    return numpy.stack(rows)


# How text and activations are rounded to float32 depends on the batch and the machine. A mean is up to 22 standard
# deviations here, so what rounding changes is up to 22 times as large a part of std as of the mean.
MEAN_RTOL, STD_RTOL = 1e-5, 1e-4


def assert_same(
    one: ActivationStatistics, other: ActivationStatistics, mean_rtol: float = MEAN_RTOL, std_rtol: float = STD_RTOL
) -> None:
    assert one.count == other.count
    for layer in other.layers:
        torch.testing.assert_close(one.mean[layer], other.mean[layer], rtol=mean_rtol, atol=0)
        torch.testing.assert_close(one.std[layer], other.std[layer], rtol=std_rtol, atol=0)


class TestCollect:
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_mean_and_unbiased_std_are_numpys(self, pipe: StableDiffusionPipeline, batch_size: int) -> None:
        statistics = collect_statistics(pipe, PROMPTS, batch_size=batch_size)
        assert statistics.count == len(PROMPTS)
        assert statistics.layers == tuple(DOWN_AND_MID)
        for layer in DOWN_AND_MID:
            activations = activations_by_hand(pipe, layer)
            numpy.testing.assert_allclose(statistics.mean[layer], activations.mean(axis=0), rtol=MEAN_RTOL)
            numpy.testing.assert_allclose(statistics.std[layer], activations.std(axis=0, ddof=1), rtol=STD_RTOL)

    def test_same_prompts_give_the_same_bits(self, pipe: StableDiffusionPipeline) -> None:
        assert collect_statistics(pipe, PROMPTS).digest() == collect_statistics(pipe, PROMPTS).digest()

    def test_switched_off_neurons_are_measured_all_the_same(
        self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics
    ) -> None:
        with patched(pipe, {MID: [0, 1]}):
            assert collect_statistics(pipe, PROMPTS).digest() == statistics.digest()

    def test_every_modules_own_mode_comes_back(self, pipe: StableDiffusionPipeline) -> None:
        pipe.text_encoder.train()
        try:
            collect_statistics(pipe, PROMPTS)
            assert all(module.training for module in pipe.text_encoder.modules())
            assert not pipe.unet.training
        finally:
            pipe.text_encoder.eval()

    def test_warns_of_what_is_cut_off_where_it_is_called(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.warns(UserWarning, match=f"cut to {TOKENS} tokens: 'a+'$") as caught:
            collect_statistics(pipe, ["short", "a" * TOKENS])
        assert caught[0].filename == __file__

    def test_layers_are_a_choice(self, pipe: StableDiffusionPipeline) -> None:
        assert collect_statistics(pipe, PROMPTS, layers=[MID, FIRST]).layers == (FIRST, MID)

    @pytest.mark.parametrize(
        ("prompts", "said"),
        [
            (["one"], "a standard deviation needs two prompts or more, got 1"),
            ("one text", "prompts must be a sequence of texts, got one text"),
            (["one", 2], "prompt 1 must be text, got int"),
        ],
    )
    def test_refuses_too_few_or_no_texts(self, pipe: StableDiffusionPipeline, prompts: list[str], said: str) -> None:
        with pytest.raises(NemoError, match=said):
            collect_statistics(pipe, prompts)


class TestOwnLinears:
    """`collect_statistics` encodes text with the operator in place of PyTorch's linear layers."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
        """The weights that the operator was called with."""
        weights: list[torch.Tensor] = []
        original = ops.value_projection

        def counted(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
            weights.append(weight)
            return original(hidden, weight, *others)

        monkeypatch.setattr(ops, "value_projection", counted)
        return weights

    def test_runs_every_linear_layer_of_the_text_encoder(
        self, pipe: StableDiffusionPipeline, calls: list[torch.Tensor]
    ) -> None:
        collect_statistics(pipe, PROMPTS)
        linears = [module for module in pipe.text_encoder.modules() if isinstance(module, torch.nn.Linear)]
        assert linears
        assert {id(weight) for weight in calls} == {id(module.weight) for module in linears}

    def test_is_exact_up_to_float32_rounding(self, calls: list[torch.Tensor]) -> None:
        """Of a sum of 512 products that is √512 · 2⁻²⁴ = 1.4e-6 or less, and a handful of them follow each other."""
        demo = load_demo_pipeline()
        tokens = demo.tokenizer(["a red cat on the moon", "nine boats"], padding="max_length", return_tensors="pt")
        with torch.no_grad():
            with accelerated_linears(demo.text_encoder):
                ours = demo.text_encoder(tokens.input_ids)[0]
            assert calls
            exact = demo.text_encoder.double()(tokens.input_ids)[0]
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()

    def test_leaves_weights_that_are_no_plain_tensors_to_pytorch(self, calls: list[torch.Tensor]) -> None:
        class Quantized(torch.nn.Parameter):
            pass

        linear = torch.nn.Linear(4, 3)
        linear.weight = Quantized(linear.weight)
        with accelerated_linears(linear):
            linear(torch.zeros(2, 4))
        assert not calls

    def test_leaves_layers_with_a_forward_of_their_own_alone(self, calls: list[torch.Tensor]) -> None:
        linear = torch.nn.Linear(4, 3)
        linear.forward = own = lambda hidden: hidden
        with accelerated_linears(linear):
            linear(torch.zeros(2, 4))
        assert not calls
        assert linear.forward is own

    def test_ends_with_the_collection_also_after_an_error(
        self, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise NemoError("no")

        monkeypatch.setattr(ValueStack, "activations", fail)
        with pytest.raises(NemoError, match="no"):
            collect_statistics(pipe, PROMPTS)
        assert not any("forward" in vars(module) for module in pipe.text_encoder.modules())

    def test_leaves_float64_to_pytorch(self, calls: list[torch.Tensor]) -> None:
        exact = tiny_pipeline()
        exact.text_encoder.double()
        assert collect_statistics(exact, PROMPTS).count == len(PROMPTS)
        assert not calls

    def test_padding_has_its_part_in_every_activation(self, pipe: StableDiffusionPipeline) -> None:
        """So encoding the words alone, which are a fraction of the tokens, would give other statistics."""
        one, other = encode_prompts(pipe, ["red cat", "red dog"]).hidden
        words = pipe.tokenizer("red cat", return_tensors="pt").input_ids.shape[1]
        assert words < TOKENS
        assert not torch.allclose(one[words:], other[words:], rtol=1e-3)
        weight = value_layers(pipe)[FIRST].weight
        of_all = (one @ weight.T).abs().mean(0)
        torch.testing.assert_close(prompt_activations(pipe, ["red cat"])[FIRST][0], of_all.detach())
        assert not torch.allclose((one[:words] @ weight.T).abs().mean(0), of_all, rtol=1e-2)


class TestUpdate:
    def test_refuses_weights_of_other_layers(self, pipe: StableDiffusionPipeline) -> None:
        statistics = ActivationStatistics({MID: 32})
        with pytest.raises(NemoError, match="statistics are of 1 layers, 32 neurons, got weights of 7 layers"):
            statistics.update(torch.zeros(1, 2, TEXT_WIDTH), ValueStack(value_layers(pipe)))

    def test_activation_that_is_not_finite_names_its_layer_and_changes_nothing(
        self, pipe: StableDiffusionPipeline
    ) -> None:
        stack = ValueStack(value_layers(pipe))
        statistics = ActivationStatistics(stack.widths)
        statistics.update(torch.randn(3, TOKENS, TEXT_WIDTH), stack)
        before = statistics.digest()
        with pytest.raises(NemoError, match=f"{FIRST}: the activations of these prompts are not finite"):
            statistics.update(torch.full((1, TOKENS, TEXT_WIDTH), float("nan")), stack)
        assert statistics.digest() == before


class TestLeftOutPrompts:
    """On CUDA the operator leaves a call with an activation that isn't finite out, and nothing is raised there."""

    @pytest.fixture
    def incomplete(self, monkeypatch: pytest.MonkeyPatch) -> ActivationStatistics:
        """Seven prompts given in batches of 2, 3 and 2, the second of which the operator has left out."""
        on_the_cpu = ops.value_projection_stats

        def as_on_cuda(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[None, torch.Tensor]:
            if hidden.isfinite().all():
                return on_the_cpu(hidden, weight, *others)
            return None, torch.full((hidden.shape[0], weight.shape[0]), torch.nan)

        monkeypatch.setattr(ops, "value_projection_stats", as_on_cuda)
        statistics = ActivationStatistics({"a": 2})
        for batch in (torch.ones(2, 1, 1), torch.full((3, 1, 1), torch.nan), torch.ones(2, 1, 1)):
            statistics.update(batch, _stack_of_ones())
        return statistics

    @pytest.mark.parametrize(
        "read",
        [
            lambda statistics, path: statistics.count,
            lambda statistics, path: statistics.mean,
            lambda statistics, path: statistics.std,
            lambda statistics, path: statistics.z_scores({"a": torch.ones(2)}),
            lambda statistics, path: statistics.digest(),
            lambda statistics, path: statistics.save(path),
            lambda statistics, path: statistics.merge(ActivationStatistics({"a": 2})),
            lambda statistics, path: ActivationStatistics({"a": 2}).merge(statistics),
        ],
        ids=["count", "mean", "std", "z_scores", "digest", "save", "merge", "merge_into_another"],
    )
    def test_are_reported_by_whatever_reads_the_statistics(
        self, read: Any, incomplete: ActivationStatistics, tmp_path: Path
    ) -> None:
        said = "the statistics lack 3 of 7 prompts, because an activation .* is not finite.*collect on the CPU"
        with pytest.raises(NemoError, match=said):
            read(incomplete, tmp_path / "stats.safetensors")
        assert not list(tmp_path.iterdir())

    def test_end_a_collection(self, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ValueStack, "activations", lambda *_: None)
        with pytest.raises(NemoError, match="the statistics lack 9 of 9 prompts"):
            collect_statistics(pipe, PROMPTS)


class TestMerge:
    def test_parts_in_any_order_are_the_whole(
        self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics
    ) -> None:
        parts = [collect_statistics(pipe, PROMPTS[a:b]) for a, b in ((0, 2), (2, 5), (5, 9))]
        for first, second, third in itertools.permutations(parts):
            assert_same(first.merge(second).merge(third), statistics)
            assert_same(first.merge(second.merge(third)), first.merge(second).merge(third), 1e-12, 1e-12)

    def test_with_an_empty_one_changes_nothing(self, statistics: ActivationStatistics) -> None:
        empty = ActivationStatistics(statistics.widths, fingerprint=statistics.fingerprint)
        assert_same(statistics.merge(empty), statistics, 0, 0)
        assert_same(empty.merge(statistics), statistics, 0, 0)
        assert empty.merge(empty).count == 0

    def test_refuses_another_model(self, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="only statistics of one model and the same layers merge"):
            statistics.merge(ActivationStatistics(statistics.widths, fingerprint="another"))


class TestZScores:
    def test_are_distances_in_standard_deviations(self, statistics: ActivationStatistics) -> None:
        shifted = {MID: statistics.mean[MID] - 2.5 * statistics.std[MID]}
        torch.testing.assert_close(statistics.z_scores(shifted)[MID], torch.full((32,), 2.5, dtype=torch.float64))

    def test_without_any_spread_are_0_at_the_mean_and_infinite_elsewhere(self) -> None:
        statistics = ActivationStatistics({"a": 2})
        statistics.update(torch.ones(3, 1, 1), _stack_of_ones())
        assert statistics.z_scores({"a": torch.tensor([1.0, 1.5])})["a"].tolist() == [0, float("inf")]

    def test_need_two_prompts(self) -> None:
        with pytest.raises(NemoError, match="needs two prompts or more, got 0"):
            ActivationStatistics({"a": 2}).z_scores({"a": torch.ones(2)})

    def test_of_an_unknown_layer_are_refused(self, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="the statistics have no layer 'b'"):
            statistics.z_scores({"b": torch.ones(2)})


def _stack_of_ones() -> ValueStack:
    linear = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.ones_(linear.weight)
    return ValueStack({"a": linear})


class TestFiles:
    def test_round_trip(self, tmp_path: Path, statistics: ActivationStatistics) -> None:
        path = tmp_path / "new folder" / "stats.safetensors"
        statistics.save(path)
        loaded = ActivationStatistics.load(path)
        assert loaded.digest() == statistics.digest()
        assert (loaded.layers, loaded.fingerprint) == (statistics.layers, statistics.fingerprint)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_equal_statistics_are_equal_files(self, tmp_path: Path, statistics: ActivationStatistics) -> None:
        statistics.save(tmp_path / "a")
        ActivationStatistics.load(tmp_path / "a").save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_loaded_ones_can_be_added_to(
        self, tmp_path: Path, pipe: StableDiffusionPipeline, statistics: ActivationStatistics
    ) -> None:
        collect_statistics(pipe, PROMPTS[:4]).save(tmp_path / "a")
        loaded = ActivationStatistics.load(tmp_path / "a")
        loaded.update(encode_prompts(pipe, PROMPTS[4:]).hidden, ValueStack(value_layers(pipe)))
        assert_same(loaded, statistics)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("no tensors")
        with pytest.raises(NemoError, match="a does not hold activation statistics"):
            ActivationStatistics.load(tmp_path / "a")
        safetensors.torch.save_file({"mean": torch.zeros(1)}, tmp_path / "b")
        with pytest.raises(NemoError, match="b does not hold activation statistics: wanted format"):
            ActivationStatistics.load(tmp_path / "b")

    @pytest.mark.parametrize(
        "description",
        ["{", "[]", '{"format": "nemo_ext.statistics.1"}', '{"format": "nemo_ext.statistics.1", "layers": 1}'],
    )
    def test_damaged_descriptions_are_refused(self, tmp_path: Path, description: str) -> None:
        safetensors.torch.save_file({"mean": torch.zeros(1)}, tmp_path / "a", {"nemo_ext": description})
        with pytest.raises(NemoError, match="a does not hold activation statistics"):
            ActivationStatistics.load(tmp_path / "a")


class TestCheck:
    def test_accepts_the_model_they_come_from(
        self, pipe: StableDiffusionPipeline, statistics: ActivationStatistics
    ) -> None:
        statistics.check(pipe)
        with patched(pipe, {MID: [0]}):
            statistics.check(pipe)

    def test_refuses_another_model(self, statistics: ActivationStatistics) -> None:
        with pytest.raises(NemoError, match="collected from another model or in another dtype"):
            statistics.check(tiny_pipeline(seed=1))


class TestEncodePrompts:
    def test_texts_come_in_the_unets_dtype_whatever_the_text_encoders(self) -> None:
        mixed = tiny_pipeline()
        mixed.text_encoder.half()
        assert encode_prompts(mixed, PROMPTS).hidden.dtype == mixed.unet.dtype == torch.float32
        assert collect_statistics(mixed, PROMPTS).count == len(PROMPTS)

    def test_gives_what_the_pipeline_itself_would_use(self, pipe: StableDiffusionPipeline) -> None:
        expected, _ = pipe.encode_prompt(list(PROMPTS), "cpu", 1, do_classifier_free_guidance=False)
        hidden = encode_prompts(pipe, PROMPTS).hidden
        assert hidden.shape == (len(PROMPTS), TOKENS, TEXT_WIDTH)
        assert torch.equal(hidden, expected)
        assert not hidden.requires_grad

    def test_warns_of_what_is_cut_off_and_only_then(self, pipe: StableDiffusionPipeline) -> None:
        fits = "a" * (TOKENS - 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode_prompts(pipe, ["short", fits])
        with pytest.warns(UserWarning, match=f"cut to {TOKENS} tokens: '{fits}b' and 1 more"):
            encode_prompts(pipe, ["short", fits + "b", fits + "c"])

    def test_refuses_pipelines_with_two_text_encoders(self, pipe: StableDiffusionPipeline) -> None:
        pipe.text_encoder_2 = pipe.text_encoder
        try:
            with pytest.raises(NemoError, match="StableDiffusionPipeline has several text encoders"):
                encode_prompts(pipe, ["a"])
        finally:
            del pipe.text_encoder_2

    def test_refuses_no_text(self, pipe: StableDiffusionPipeline) -> None:
        with pytest.raises(NemoError, match="at least one text, got none"):
            encode_prompts(pipe, [])


def test_prompt_activations_are_those_that_the_statistics_are_of(pipe: StableDiffusionPipeline) -> None:
    for layer, activation in prompt_activations(pipe, PROMPTS).items():
        assert activation.dtype == torch.float32
        numpy.testing.assert_allclose(activation, activations_by_hand(pipe, layer), rtol=1e-5, atol=1e-7)
