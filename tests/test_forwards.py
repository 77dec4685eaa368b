"""Other forwards for modules, for the length of a block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nemo_ext.forwards import replaced_forwards


def doubled(_: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda given: 2 * forward(given)


def test_the_replacement_runs_in_the_block_and_not_after_it() -> None:
    module, given = nn.Linear(2, 2), torch.rand(1, 2)
    own = module(given)
    with replaced_forwards({"name": module}, doubled):
        assert torch.equal(module(given), 2 * own)
    assert torch.equal(module(given), own)
    assert "forward" not in vars(module)


def test_the_replacement_knows_the_name_and_may_leave_the_module_out() -> None:
    modules = {"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)}
    with replaced_forwards(modules, lambda name, _: lambda *_: name):
        assert [module(None) for module in modules.values()] == ["one", "two"]


def test_an_own_forward_of_the_module_comes_back() -> None:
    module = nn.Identity()
    own = lambda given: given + 1  # noqa: E731
    module.forward = own
    with replaced_forwards({"name": module}, doubled):
        assert module(torch.zeros(1)) == 2
    assert module.forward is own


def test_everything_comes_back_after_an_exception() -> None:
    modules = {str(number): nn.Linear(2, 2) for number in range(3)}

    def fails_at_the_last(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if name == "2":
            raise KeyboardInterrupt
        return forward

    with pytest.raises(KeyboardInterrupt), replaced_forwards(modules, fails_at_the_last):
        pass
    assert all("forward" not in vars(module) for module in modules.values())
