"""Running a U-Net from a value layer on: the bits of a whole call, for a share of the work, without a trace."""

from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipeline import CHANNELS, TEXT_WIDTH, tiny_pipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_ext.demo import load_demo_pipeline
from nemo_ext.models.layers import value_layers
from nemo_ext.models.state import is_compiled
from nemo_ext.patching.patch import patch, patched
from nemo_ext.search.partial_unet import _FLOPS, FULL_RUN, EntryPoints

ROWS = 3


def sd1() -> UNet2DConditionModel:
    return tiny_pipeline().unet


def sd1_with_text_in_up_blocks() -> UNet2DConditionModel:
    return tiny_pipeline(text_in_up_blocks=True).unet


def sd2() -> UNet2DConditionModel:
    """Stable Diffusion 2's differences: linear projections, a number of heads for each block; here also odd sizes."""
    return UNet2DConditionModel(
        sample_size=18,
        block_out_channels=CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 8, 8),
        use_linear_projection=True,
        transformer_layers_per_block=2,
        norm_num_groups=4,
    ).eval()


def demo() -> UNet2DConditionModel:
    return load_demo_pipeline().unet


class Inputs:
    """A batch for a U-Net; the text is the same in every row, as in a search."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        config = unet.config
        self.unet = unet
        self.sample = torch.randn(ROWS, config.in_channels, config.sample_size, config.sample_size)
        self.hidden = torch.randn(1, 5, config.cross_attention_dim)

    def noise(self, rows: slice = slice(None)) -> Tensor:
        sample = self.sample[rows]
        with torch.no_grad():
            return self.unet(sample, 981, encoder_hidden_states=self.hidden.expand(len(sample), -1, -1)).sample


def observed(unet: nn.Module, layers: Sequence[str]) -> EntryPoints | None:
    """The entry points of a U-Net, found while it evaluates zeros."""
    config = unet.config

    def evaluate(rows: int) -> None:
        sample = torch.zeros(rows, config.in_channels, config.sample_size, config.sample_size)
        with torch.no_grad():
            unet(sample, 1, encoder_hidden_states=torch.zeros(rows, 5, config.cross_attention_dim))

    return EntryPoints.of(unet, layers, evaluate)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return sd1_with_text_in_up_blocks()


@pytest.fixture(scope="module")
def entry_points(unet: UNet2DConditionModel) -> EntryPoints:
    found = observed(unet, list(value_layers(unet, "all")))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (sd1, "down+mid"),
        pytest.param(sd1_with_text_in_up_blocks, "all", marks=pytest.mark.slow),
        pytest.param(sd2, "down+mid", marks=pytest.mark.slow),
        pytest.param(demo, "down+mid", marks=pytest.mark.slow),
    ],
)
def test_from_every_layer_on_gives_the_bits_of_a_whole_call(
    make: Callable[[], UNet2DConditionModel], layers: str
) -> None:
    unet = make()
    inputs = Inputs(unet)
    entry_points = observed(unet, list(value_layers(unet, layers)))
    assert entry_points is not None
    assert sorted(entry_points.layers) == sorted(value_layers(unet, layers))
    with patched(unet):
        with entry_points.entering(FULL_RUN, [{}] * ROWS) as rows:
            untouched = inputs.noise()
        assert torch.equal(untouched, inputs.noise())
        for place, layer in enumerate(entry_points.layers):
            with patched(unet, {layer: [0, 3]}):
                with entry_points.entering(place, rows):
                    entered = inputs.noise()
                assert torch.equal(entered, inputs.noise())
                assert not torch.equal(entered, untouched)


def test_what_a_late_call_notes_serves_a_still_later_one(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    inputs = Inputs(unet)
    first, last = entry_points.layers[2], entry_points.layers[-1]
    with patched(unet):
        with entry_points.entering(FULL_RUN, [{}] * ROWS) as rows:
            inputs.noise()
        with patched(unet, {first: [1]}), entry_points.entering(2, rows) as rows:
            inputs.noise()
        with patched(unet, {first: [1], last: [2]}):
            with entry_points.entering(len(entry_points.layers) - 1, rows):
                entered = inputs.noise()
            assert torch.equal(entered, inputs.noise())


def test_rows_of_a_batch_may_come_from_different_runs(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    inputs = Inputs(unet)
    with patched(unet):
        rows = []
        for row in range(ROWS):
            with entry_points.entering(FULL_RUN, [{}]) as noted:
                inputs.noise(slice(row, row + 1))
            rows += noted
        with patched(unet, {entry_points.layers[4]: [1]}):
            with entry_points.entering(4, rows[::-1]):
                entered = inputs.noise(slice(None))
            inputs.sample = inputs.sample.flip(0)
            torch.testing.assert_close(entered, inputs.noise(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shares_are_those_of_the_work_that_is_done(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    inputs = Inputs(unet)

    def flops(place: int, rows: list) -> int:
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter, entry_points.entering(place, rows):
            inputs.noise()
        return counter.get_total_flops()

    with entry_points.entering(FULL_RUN, [{}] * ROWS) as rows:
        inputs.noise()
    whole = flops(FULL_RUN, [{}] * ROWS)
    for place, share in enumerate(entry_points.shares):
        assert flops(place, rows) / whole == pytest.approx(share)
    assert list(entry_points.shares) == sorted(entry_points.shares, reverse=True)
    assert 0 < entry_points.shares[-1] < entry_points.shares[0] < 1


def test_patched_and_plain_value_layers_cost_the_same(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    with patched(unet):
        again = observed(unet, entry_points.layers)
    assert again is not None
    assert again.shares == entry_points.shares


def test_rows_hold_no_more_memory_than_said(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    with entry_points.entering(FULL_RUN, [{}] * ROWS) as rows:
        Inputs(unet).noise()
    tensors = [tensor for output in rows[0].values() for tensor in (output if isinstance(output, tuple) else (output,))]
    flat = [part for tensor in tensors for part in (tensor if isinstance(tensor, tuple) else (tensor,))]
    assert sum(tensor.nbytes for tensor in flat) == entry_points.row_bytes


def test_leaves_no_trace_also_after_an_exception(unet: UNet2DConditionModel, entry_points: EntryPoints) -> None:
    own = lambda *args, **kwargs: type(unet.conv_in).forward(unet.conv_in, *args, **kwargs)  # noqa: E731
    unet.conv_in.forward = own
    before = [(type(module), set(vars(module))) for module in unet.modules()]

    def interrupted() -> None:
        with entry_points.entering(FULL_RUN, [{}]):
            assert unet.conv_in.forward is not own
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(type(module), set(vars(module))) for module in unet.modules()] == before
    assert unet.conv_in.forward is own
    del unet.conv_in.forward


def test_a_unet_that_changes_in_place_what_a_module_returned_is_refused() -> None:
    """What an earlier run noted would be what was returned, or what it became."""
    unet = sd1()
    block = unet.down_blocks[1]
    original = block.forward

    def forward(hidden_states: Tensor, **others: object) -> object:
        return original(hidden_states=hidden_states.add_(1), **others)

    block.forward = forward
    assert observed(unet, list(value_layers(unet))) is None


def test_a_value_layer_that_is_called_twice_has_no_before() -> None:
    unet = sd1()
    mid = unet.mid_block
    original = mid.forward

    def twice(sample: Tensor, *args: object, **kwargs: object) -> Tensor:
        return original(original(sample, *args, **kwargs), *args, **kwargs)

    mid.forward = twice
    assert observed(unet, list(value_layers(unet))) is None


@pytest.mark.parametrize("compiled", ["whole", "in place", "a block"])
def test_a_compiled_unet_is_only_called_as_a_whole(compiled: str) -> None:
    unet: nn.Module = sd1()
    patch(unet)
    layers = list(value_layers(unet))
    if compiled == "whole":
        unet = torch.compile(unet, backend="eager")
    elif compiled == "in place":
        unet.compile(backend="eager")
    else:
        unet.mid_block.compile(backend="eager")
    assert is_compiled(unet)
    assert observed(unet, layers) is None
