"""Values kept between calls: given again where nothing has changed, computed anew after every kind of change.

A value layer's result is the very same tensor when it was kept, and another one when it was computed.
"""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from neurons_off import handle_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import linear

from nemo_ext.patching.patch import patch
from nemo_ext.patching.rows import scaled_rows
from nemo_ext.patching.value_cache import ValueCache
from nemo_ext.patching.value_projection import ValueProjection

LAYER = "down_blocks.0.to_v"
TOKENS, TEXT_WIDTH, NEURONS = 5, 12, 8


def patched_unet() -> nn.Module:
    """As little of a U-Net as patching asks for: one cross-attention, whose value layer has a bias."""
    attention = nn.Module()
    attention.is_cross_attention = True
    attention.to_v = nn.Linear(TEXT_WIDTH, NEURONS)
    unet = nn.Module()
    unet.down_blocks = nn.ModuleList([attention])
    patch(unet)
    return unet


@pytest.fixture
def unet() -> nn.Module:
    return patched_unet()


@pytest.fixture
def layer(unet: nn.Module) -> ValueProjection:
    return unet.get_submodule(LAYER)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, TOKENS, TEXT_WIDTH)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def assert_computed_anew(layer: ValueProjection, hidden: Tensor, change: Callable[[], object]) -> None:
    """After `change` the layer gives what a plain linear layer with its present weights and scale does."""
    before = layer(hidden)
    assert layer(hidden) is before
    change()
    after = layer(hidden)
    expected = linear(hidden, layer.weight, layer.bias) * layer.neuron_scale.to(layer.weight.dtype)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert after is not before


@pytest.mark.usefixtures("no_grad")
class TestIsComputedOnce:
    @pytest.mark.parametrize("neurons", [{}, {LAYER: [1, 2]}])
    def test_for_the_same_tensor(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor, neurons: dict) -> None:
        handle_of(unet).set_neurons(neurons)
        assert layer(hidden) is layer(hidden)

    def test_without_a_bias(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer.bias = None
        assert layer(hidden) is layer(hidden)

    def test_under_autocast(self, layer: ValueProjection, hidden: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(hidden) is layer(hidden)

    def test_with_gradients_on_where_none_is_wanted(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer.requires_grad_(False)
        with torch.enable_grad():
            assert layer(hidden) is layer(hidden)


@pytest.mark.usefixtures("no_grad")
class TestIsComputedAnewAfter:
    def test_another_embedding(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer(hidden)
        other = torch.randn_like(hidden)
        assert torch.equal(layer(other), linear(other, layer.weight, layer.bias))

    def test_an_embedding_that_has_a_dead_ones_id_and_memory(self, layer: ValueProjection) -> None:
        numbers = torch.randn(100, 2, TOKENS, TEXT_WIDTH)
        seen = set()
        for own in numbers:
            hidden = own.clone()
            seen.add((id(hidden), hidden.data_ptr()))
            # Not always bit for bit: the memory of `own` is aligned in another way.
            torch.testing.assert_close(layer(hidden), linear(own, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
            del hidden
        if len(seen) == len(numbers):
            pytest.skip("the allocator gave no memory out again")

    def test_a_change_of_the_embedding_in_place(self, layer: ValueProjection, hidden: Tensor) -> None:
        assert_computed_anew(layer, hidden, lambda: hidden[0].mul_(2))

    def test_a_change_that_pytorch_does_not_count(self, layer: ValueProjection, hidden: Tensor) -> None:
        """Averages of weights are copied in through `.data`, and NumPy writes past every counter."""
        assert_computed_anew(layer, hidden, lambda: layer.weight.data.mul_(2))
        assert_computed_anew(layer, hidden, lambda: hidden.numpy()[0].fill(1))

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_a_change_of_a_parameter_in_place(self, layer: ValueProjection, hidden: Tensor, name: str) -> None:
        assert_computed_anew(layer, hidden, lambda: getattr(layer, name)[0].add_(1))

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_another_parameter(self, layer: ValueProjection, hidden: Tensor, name: str) -> None:
        other = nn.Parameter(torch.randn_like(getattr(layer, name)))
        assert_computed_anew(layer, hidden, lambda: setattr(layer, name, other))

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_another_memory_of_a_parameter(self, layer: ValueProjection, hidden: Tensor, name: str) -> None:
        parameter = getattr(layer, name)
        assert_computed_anew(layer, hidden, lambda: setattr(parameter, "data", torch.randn_like(parameter)))

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_another_parameter_over_the_same_memory(self, layer: ValueProjection, hidden: Tensor, name: str) -> None:
        parameter = getattr(layer, name)
        parameter.mul_(1)  # its version is 1 or more

        def change() -> None:
            other = nn.Parameter(parameter.data)
            for _ in range(parameter._version):
                other.add_(1)
            assert (other._version, other.data_ptr()) == (parameter._version, parameter.data_ptr())
            setattr(layer, name, other)

        before = layer(hidden).clone()
        change()
        assert not torch.equal(layer(hidden), before)

    def test_another_view_of_the_same_memory(self, layer: ValueProjection) -> None:
        layer.weight = nn.Parameter(torch.randn(NEURONS, NEURONS))
        layer.bias = nn.Parameter(torch.randn(2 * NEURONS)[::2])
        hidden = torch.randn(2, TOKENS, NEURONS)
        assert_computed_anew(layer, hidden, lambda: setattr(layer.weight, "data", layer.weight.data.T))
        adjacent = layer.bias.data.as_strided((NEURONS,), (1,))
        assert_computed_anew(layer, hidden, lambda: setattr(layer.bias, "data", adjacent))

    def test_another_memory_of_a_parameter_at_a_freed_address(self, layer: ValueProjection) -> None:
        width = 1024  # large enough for its memory to be used again at once
        hidden = torch.randn(2, TOKENS, width)
        for weight in list(torch.randn(20, NEURONS, width)):
            layer.weight.data = torch.empty(0)
            layer.weight.data = weight.clone()
            assert torch.equal(layer(hidden), linear(hidden, weight, layer.bias))

    def test_a_bias_is_taken_away(self, layer: ValueProjection, hidden: Tensor) -> None:
        before = layer(hidden)
        layer.bias = None
        assert layer(hidden) is not before

    def test_a_state_dict_is_loaded(self, layer: ValueProjection, hidden: Tensor) -> None:
        other = nn.Linear(TEXT_WIDTH, NEURONS).state_dict()
        assert_computed_anew(layer, hidden, lambda: layer.load_state_dict(other))

    def test_weights_are_rounded_by_half_and_back(self, layer: ValueProjection, hidden: Tensor) -> None:
        before = layer(hidden)
        layer.half().float()
        assert not torch.equal(layer(hidden), before)

    def test_another_dtype_of_everything(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer(hidden)
        layer.to(torch.bfloat16)
        assert layer(hidden.to(torch.bfloat16)).dtype == torch.bfloat16

    def test_other_neurons(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor) -> None:
        assert_computed_anew(layer, hidden, lambda: handle_of(unet).set_neurons({LAYER: [1]}))
        assert_computed_anew(layer, hidden, lambda: handle_of(unet).set_neurons({LAYER: [2]}))
        assert_computed_anew(layer, hidden, lambda: handle_of(unet).set_neurons())

    def test_a_change_of_the_scale_by_hand(self, layer: ValueProjection, hidden: Tensor) -> None:
        assert_computed_anew(layer, hidden, lambda: layer.neuron_scale[3].fill_(0.5))

    def test_rows_of_a_scale(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor) -> None:
        before = layer(hidden)
        rows = torch.rand(2, NEURONS)
        with scaled_rows(handle_of(unet), {LAYER: rows}):
            first = layer(hidden)
            torch.testing.assert_close(first, before * rows[:, None], rtol=1e-5, atol=1e-6)
            rows[1] = 0
            assert layer(hidden)[1].abs().max() == 0
        assert torch.equal(layer(hidden), before)

    def test_rows_of_a_scale_that_have_the_id_of_dead_ones(
        self, unet: nn.Module, layer: ValueProjection, hidden: Tensor
    ) -> None:
        unscaled = layer(hidden)
        for factor in range(20):
            with scaled_rows(handle_of(unet), {LAYER: torch.full((2, NEURONS), float(factor))}):
                torch.testing.assert_close(layer(hidden), unscaled * factor, rtol=1e-5, atol=1e-5)

    def test_autocast_begins_or_has_another_dtype(self, layer: ValueProjection, hidden: Tensor) -> None:
        assert layer(hidden).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(hidden).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert layer(hidden).dtype == torch.float16
        assert layer(hidden).dtype == torch.float32

    def test_the_values_are_changed_in_place(self, layer: ValueProjection, hidden: Tensor) -> None:
        assert_computed_anew(layer, hidden, lambda: layer(hidden).mul_(2))

    def test_a_view_of_the_values_is_changed_in_place(self, layer: ValueProjection, hidden: Tensor) -> None:
        assert_computed_anew(layer, hidden, lambda: layer(hidden)[..., 2:].transpose(1, 2).zero_())

    def test_the_values_are_changed_under_inference_mode(self, layer: ValueProjection, hidden: Tensor) -> None:
        values = layer(hidden)
        with torch.inference_mode():
            values.zero_()
        assert torch.equal(layer(hidden), linear(hidden, layer.weight, layer.bias))

    def test_a_hook_that_changes_what_the_layer_gives(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer.register_forward_hook(lambda module, inputs, values: values.mul_(2))
        expected = linear(hidden, layer.weight, layer.bias) * 2
        for _ in range(3):
            torch.testing.assert_close(layer(hidden), expected)

    @pytest.mark.leg("cuda")
    def test_another_cuda_stream(self, device: torch.device, unet: nn.Module, layer: ValueProjection) -> None:
        unet.to(device)
        hidden = torch.randn(2, TOKENS, TEXT_WIDTH, device=device)
        first = layer(hidden)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            assert layer(hidden) is not first

    def test_a_change_while_the_values_are_computed(self, hidden: Tensor) -> None:
        """As another thread may make one: the values may be of before or after it, and aren't given again."""
        weight, scale = nn.Parameter(torch.randn(NEURONS, TEXT_WIDTH)), torch.ones(NEURONS)
        cache = ValueCache()

        def interrupted(input: Tensor, *operands: Tensor | None) -> Tensor:
            values = linear(input, weight) * scale
            scale.zero_()
            return values

        cache.get(interrupted, hidden, weight, None, scale)
        values = cache.get(lambda input, *operands: linear(input, weight) * scale, hidden, weight, None, scale)
        assert values.abs().max() == 0


class TestIsNeverKept:
    @pytest.mark.parametrize("wanted", ["input", "weight", "bias", "scale"])
    def test_where_a_gradient_is_wanted(self, layer: ValueProjection, hidden: Tensor, wanted: str) -> None:
        layer.requires_grad_(False)
        leaf = {"input": hidden, "weight": layer.weight, "bias": layer.bias, "scale": layer.neuron_scale}[wanted]
        with torch.no_grad():
            layer(hidden)
        leaf.requires_grad_()
        for calls in (1, 2):
            layer(hidden).sum().backward()
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, calls * torch.autograd.grad(layer(hidden).sum(), leaf)[0])

    def test_where_the_caller_makes_the_values_a_leaf(self, layer: ValueProjection, hidden: Tensor) -> None:
        with torch.no_grad():
            values = layer(hidden).requires_grad_()
            assert not layer(hidden).requires_grad
        assert values.requires_grad

    def test_under_inference_mode(self, layer: ValueProjection, hidden: Tensor) -> None:
        """An inference tensor must not come out of it, into a graph that wants to keep it for a gradient."""
        layer.requires_grad_(False)
        with torch.inference_mode():
            assert layer(hidden).is_inference()
        query = torch.ones(NEURONS, requires_grad=True)
        (layer(hidden) * query).sum().backward()
        assert query.grad is not None

    @pytest.mark.parametrize("what", ["input", "weight", "scale"])
    def test_for_inference_tensors_whose_changes_nobody_counts(
        self, unet: nn.Module, layer: ValueProjection, hidden: Tensor, what: str
    ) -> None:
        with torch.inference_mode():
            tensor = torch.ones({"input": (2, TOKENS, TEXT_WIDTH), "weight": (NEURONS, TEXT_WIDTH)}.get(what, NEURONS))
            if what == "input":
                hidden = tensor
            elif what == "weight":
                layer.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                layer.neuron_scale = tensor
        with torch.no_grad():
            before = layer(hidden)
            with torch.inference_mode():
                tensor.zero_()
            assert not torch.equal(layer(hidden), before)

    def test_for_subclasses_of_tensors(self, layer: ValueProjection, hidden: Tensor) -> None:
        class Subclass(Tensor):
            pass

        special = hidden.as_subclass(Subclass)
        with torch.no_grad():
            assert layer(special) is not layer(special)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_for_parameters_given_by_functional_call(self, layer: ValueProjection, hidden: Tensor, name: str) -> None:
        several = torch.randn(3, *getattr(layer, name).shape)

        def twice(parameter: Tensor) -> Tensor:
            return sum(torch.func.functional_call(layer, {name: parameter}, (hidden,)) for _ in range(2))

        with torch.no_grad():
            operands = {"weight": layer.weight, "bias": layer.bias}
            expected = torch.stack([2 * linear(hidden, **(operands | {name: parameter})) for parameter in several])
            torch.testing.assert_close(torch.vmap(twice)(several), expected)

    def test_for_a_batch_that_vmap_makes(self, layer: ValueProjection) -> None:
        batches = torch.randn(3, 2, TOKENS, TEXT_WIDTH)
        with torch.no_grad():
            twice = torch.vmap(lambda hidden: layer(hidden) + layer(hidden))(batches)
            torch.testing.assert_close(twice, 2 * linear(batches, layer.weight, layer.bias))

    def test_on_the_meta_device(self, layer: ValueProjection, hidden: Tensor) -> None:
        layer.to("meta")
        with torch.no_grad():
            meta = hidden.to("meta")
            assert layer(meta) is not layer(meta)


@pytest.mark.usefixtures("no_grad")
class TestRecordedCalls:
    """What is recorded runs again with other neurons: it holds the operator, and nothing that was kept."""

    def test_by_torch_compile(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor) -> None:
        kept = layer(hidden)
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(hidden), kept)
        handle_of(unet).set_neurons({LAYER: [1]})
        assert compiled(hidden)[..., 1].abs().max() == 0
        handle_of(unet).set_neurons()
        torch.testing.assert_close(compiled(hidden), kept)
        other = torch.randn_like(hidden)
        torch.testing.assert_close(compiled(other), linear(other, layer.weight, layer.bias))
        assert counter.frame_count == 1

    def test_by_torch_compile_with_rows_of_a_scale(
        self, unet: nn.Module, layer: ValueProjection, hidden: Tensor
    ) -> None:
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        for rows in torch.rand(3, 2, NEURONS):
            with scaled_rows(handle_of(unet), {LAYER: rows}):
                expected = linear(hidden, layer.weight, layer.bias) * rows[:, None]
                torch.testing.assert_close(compiled(hidden), expected)
        assert counter.frame_count == 1

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_by_a_trace(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor) -> None:
        layer(hidden)
        traced = torch.jit.trace(layer, (hidden,))
        other = torch.randn_like(hidden)
        torch.testing.assert_close(traced(other), linear(other, layer.weight, layer.bias))

    @pytest.mark.leg("cuda")
    def test_by_a_cuda_graph(self, device: torch.device, unet: nn.Module, layer: ValueProjection) -> None:
        unet.to(device)
        hidden = torch.randn(2, TOKENS, TEXT_WIDTH, device=device)
        other = torch.randn_like(hidden)
        layer(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = layer(hidden)
        eager = layer(hidden)
        assert eager.data_ptr() != values.data_ptr()
        hidden.copy_(other)
        handle_of(unet).set_neurons({LAYER: [1]})
        graph.replay()
        torch.testing.assert_close(values, layer(other))


@pytest.mark.usefixtures("no_grad")
class TestMemory:
    def test_only_the_last_values_are_kept(self, layer: ValueProjection) -> None:
        embeddings = [torch.randn(2, TOKENS, TEXT_WIDTH) for _ in range(3)]
        values = [weakref.ref(layer(hidden)) for hidden in embeddings]
        assert [one() is not None for one in values] == [False, False, True]

    def test_a_layer_goes_with_all_it_has_when_nobody_has_it(self, hidden: Tensor) -> None:
        unet = patched_unet()
        layer = unet.get_submodule(LAYER)
        parts = [weakref.ref(part) for part in (layer, layer.weight, layer(hidden))]
        gc.disable()
        try:
            del unet, layer
            assert [part() for part in parts] == [None, None, None]
        finally:
            gc.enable()

    def test_a_copy_has_its_own(self, unet: nn.Module, layer: ValueProjection, hidden: Tensor) -> None:
        kept = layer(hidden)
        other = copy.deepcopy(unet)
        handle_of(other).set_neurons({LAYER: [1]})
        assert other.get_submodule(LAYER)(hidden)[..., 1].abs().max() == 0
        assert layer(hidden) is kept

    def test_a_copys_scale_is_looked_at_again(self, unet: nn.Module, hidden: Tensor) -> None:
        for _ in range(3):
            handle_of(unet).set_neurons()
        other = copy.deepcopy(unet).get_submodule(LAYER)
        for _ in range(5):  # however often its scale is changed by hand
            other.neuron_scale[1] = 0
            assert other(hidden)[..., 1].abs().max() == 0

    def test_a_patched_layer_can_be_saved_after_a_call(
        self, unet: nn.Module, layer: ValueProjection, hidden: Tensor
    ) -> None:
        values = layer(hidden)
        torch.save(unet, io.BytesIO())  # what is kept holds weak references, which cannot be written
        assert torch.equal(layer(hidden), values)
