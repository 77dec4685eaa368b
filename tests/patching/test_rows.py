"""Other neurons off in each row of a batch."""

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from neurons_off import handle_of, noise, with_rows_zeroed
from tiny_pipeline import DOWN_AND_MID, TEXT_WIDTH, TOKENS, tiny_pipeline
from torch import Tensor, nn

from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patch, patch_handle, patched, unpatch
from nemo_ext.patching.rows import neurons_off_by_row, scaled_rows

FIRST, SECOND, *_, MID = DOWN_AND_MID
SOME = NeuronSet({FIRST: [0, 5], MID: [3, 30, 31]})
OTHERS = NeuronSet({SECOND: [1, 2, 3], MID: [4]})


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(text_in_up_blocks=True)


class TestNeuronsOffByRow:
    def test_each_row_of_the_batch_has_its_own_neurons_off(self, pipe: StableDiffusionPipeline) -> None:
        expected = [noise(with_rows_zeroed(pipe, neurons)) for neurons in (SOME, OTHERS)]
        with patch_handle(pipe) as handle, neurons_off_by_row(handle, [SOME, OTHERS]):
            got = noise(pipe)
        assert not is_patched(pipe)
        torch.testing.assert_close(got, torch.stack([expected[0][0], expected[1][1]]), rtol=1e-5, atol=1e-5)

    def test_rows_that_are_alike_are_one_patch_bit_for_bit(self, pipe: StableDiffusionPipeline) -> None:
        with patched(pipe, SOME):
            expected = noise(pipe)
        with patch_handle(pipe) as handle, neurons_off_by_row(handle, [SOME, NeuronSet(SOME)]):
            assert torch.equal(noise(pipe), expected)

    def test_gives_an_earlier_patch_back(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, SOME, scale=0.5)
        before = noise(pipe)
        with patch_handle(pipe) as handle, neurons_off_by_row(handle, [SOME, OTHERS]):
            assert not torch.equal(noise(pipe), before)
        assert torch.equal(noise(pipe), before)

    def test_unknown_layers_are_refused_before_anything_changes(self, pipe: StableDiffusionPipeline) -> None:
        with (
            pytest.raises(NemoError, match=r"no value layer 'nowhere'"),
            patch_handle(pipe) as handle,
            neurons_off_by_row(handle, [SOME, NeuronSet({"nowhere": [0]})]),
        ):
            pass
        assert not is_patched(pipe)


class TestScaledRows:
    def rows(self, *neurons: NeuronSet) -> dict[str, Tensor]:
        """A scale per row: in row b `neurons[b]` are off."""
        scales = {layer: torch.ones(len(neurons), width) for layer, width in DOWN_AND_MID.items()}
        for row, own in enumerate(neurons):
            for layer, indices in own.items():
                scales[layer][row, list(indices)] = 0
        return scales

    def test_each_row_of_the_batch_has_its_own_neurons_off(self, pipe: StableDiffusionPipeline) -> None:
        expected = [noise(with_rows_zeroed(pipe, neurons)) for neurons in (SOME, OTHERS)]
        patch(pipe)
        with scaled_rows(handle_of(pipe), self.rows(SOME, OTHERS)):
            got = noise(pipe)
        torch.testing.assert_close(got, torch.stack([expected[0][0], expected[1][1]]), rtol=1e-5, atol=1e-5)
        assert (expected[0] - expected[1]).abs().max() > 1e-3

    def test_layers_not_named_keep_their_scale(self, pipe: StableDiffusionPipeline) -> None:
        expected = noise(with_rows_zeroed(pipe, NeuronSet({SECOND: OTHERS[SECOND], MID: SOME[MID]})))
        patch(pipe, OTHERS)
        with scaled_rows(handle_of(pipe), {MID: self.rows(SOME, SOME)[MID]}):
            torch.testing.assert_close(noise(pipe), expected, rtol=1e-5, atol=1e-5)

    def test_undoes_itself_after_an_exception(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, OTHERS)
        before, buffer = noise(pipe), pipe.unet.get_submodule(MID).neuron_scale

        def interrupted() -> None:
            with scaled_rows(handle_of(pipe), self.rows(SOME, SOME)):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            interrupted()
        assert pipe.unet.get_submodule(MID).neuron_scale is buffer
        assert torch.equal(noise(pipe), before)

    def test_gives_an_earlier_patch_back_even_if_the_block_unpatches(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, OTHERS)
        before = noise(pipe)
        with scaled_rows(handle_of(pipe), self.rows(SOME, SOME)):
            unpatch(pipe)
        assert torch.equal(noise(pipe), before)

    @pytest.mark.parametrize(
        "change", [unpatch, patch, lambda pipe: patch(pipe, OTHERS)], ids=["unpatch", "none", "others"]
    )
    def test_afterwards_it_is_known_as_before_which_layers_have_all_neurons_on(
        self, pipe: StableDiffusionPipeline, change: Callable[[StableDiffusionPipeline], None]
    ) -> None:
        """These are left to PyTorch: the operator would round otherwise."""
        patch(pipe, OTHERS)
        with scaled_rows(handle_of(pipe), self.rows(SOME, SOME)):
            change(pipe)
        assert {layer for layer in DOWN_AND_MID if not pipe.unet.get_submodule(layer).is_unscaled()} == set(OTHERS)

    def test_a_scale_that_the_block_changes_in_place_is_not_taken_for_the_one_before(
        self, pipe: StableDiffusionPipeline
    ) -> None:
        patch(pipe)
        expected, value_layer = noise(with_rows_zeroed(pipe, NeuronSet({MID: [3]}))), pipe.unet.get_submodule(MID)
        scale = value_layer.neuron_scale
        with scaled_rows(handle_of(pipe), {MID: torch.ones(2, 32)}):
            scale[3] = 0
        torch.testing.assert_close(noise(pipe), expected, rtol=1e-5, atol=1e-5)

    def test_neurons_set_inside_do_not_go_into_the_callers_rows(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe)
        expected, rows = noise(with_rows_zeroed(pipe, OTHERS)), self.rows(SOME, SOME)
        before = {layer: scale.clone() for layer, scale in rows.items()}
        with scaled_rows(handle_of(pipe), rows):
            handle_of(pipe).set_neurons(OTHERS)
            torch.testing.assert_close(noise(pipe), expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(rows[layer], before[layer]) for layer in rows)

    def test_gradients_reach_the_rows(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe)
        scale = torch.ones(2, 32, requires_grad=True)
        value_layer = pipe.unet.get_submodule(MID)
        hidden = torch.randn(2, TOKENS, TEXT_WIDTH)
        with scaled_rows(handle_of(pipe), {MID: scale}):
            value_layer(hidden).sum().backward()
        assert scale.grad is not None
        expected = nn.functional.linear(hidden, value_layer.weight).sum(1)
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("scales", "said"),
        [
            ({"mid_block.to_v": torch.ones(2, 32)}, "no value layer 'mid_block.to_v'"),
            ({MID: torch.ones(2, 16)}, rf"{MID}: the scale must be .* \[2, 32\] of torch.float32, got \[2, 16\] of"),
            ({MID: torch.ones(32)}, rf"{MID}: the scale must be .*, got \[32\] of torch.float32"),
            ({MID: torch.ones(())}, rf"{MID}: the scale must be .*, got \[\] of torch.float32"),
            ({MID: torch.ones(2, 32).double()}, rf"{MID}: .* of torch.float32, got \[2, 32\] of torch.float64"),
            ({FIRST: torch.ones(2, 16), MID: torch.ones(3, 32)}, rf"{MID}: .* \[2, 32\] .*, got \[3, 32\]"),
        ],
    )
    def test_refuses_by_name_what_does_not_fit(
        self, pipe: StableDiffusionPipeline, scales: dict[str, Tensor], said: str
    ) -> None:
        patch(pipe, SOME)
        before = noise(pipe)
        with pytest.raises(NemoError, match=said), scaled_rows(handle_of(pipe), scales):
            pass
        assert torch.equal(noise(pipe), before)

    def test_wants_a_patched_pipeline(self, pipe: StableDiffusionPipeline) -> None:
        with (
            pytest.raises(NemoError, match=rf"{MID} is not patched: call nemo_ext.patch\(pipe\) first"),
            scaled_rows(handle_of(pipe), {MID: torch.ones(2, 32)}),
        ):
            pass
        assert not is_patched(pipe)
