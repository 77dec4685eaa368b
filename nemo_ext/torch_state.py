"""PyTorch's global settings, which a caller may have changed, and which no result may depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run a block, or a decorated function, without gradients and with PyTorch's settings as they are at its start.

    Inside, inference mode and autocast are off, and the defaults for new tensors are float32 and the CPU. Afterwards,
    and after an exception, every setting is as it was before.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        # Inference tensors have no version counters, by which changes in place are detected.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
