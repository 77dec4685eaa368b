"""What every training stage needs: settings of the allocator, a log, checkpoints, and the training loop."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Without these settings page faults dominate training on the CPU: glibc returns large blocks to the system after every
# step and requests them again in the next one. This makes a step five to ten times slower (measured).
_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

Batch = tuple[Tensor, ...]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the CPU multiplies it fast; else float32, because without such instructions bfloat16 is slower.

    On a GPU everything is float32; whether bfloat16 would be faster there was not measured.
    """
    enabled = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def with_tuned_allocator() -> None:
    """Restart this command with the settings of the allocator, unless the process already has them."""
    if all(os.environ.get(name) == value for name, value in _ALLOCATOR.items()):
        return
    os.environ.update(_ALLOCATOR)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Log:
    """Appends figures to the file `path`, one JSON object in each line, and prints them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()

    def __call__(self, stage: str, **figures: Any) -> None:
        row = {"stage": stage, "minute": round((time.monotonic() - self._start) / 60, 2)}
        row |= {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        line = json.dumps(row)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, completely or not at all."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the state that was saved at `path`, on the CPU, or None if there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


class Average:
    """The exponential moving average of the parameters of a module, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        # These tensors share their memory with the module. Asking the module in every step takes 4 ms.
        now = module.state_dict()
        assert all(value.is_floating_point() for value in now.values())
        self._now = list(now.values())
        self.state = {name: value.clone() for name, value in now.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the parameters after `step`."""
        # In the first steps, a fixed decay would give the initial weights too much influence.
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.state.values()), self._now, 1 - decay)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the average of a checkpoint."""
        for name, value in self.state.items():
            value.copy_(state[name])


def cosine(step: int, steps: int, peak: float, warmup: int = 50, final: float = 0.02) -> float:
    """Return the learning rate at `step`: a linear warm-up, then half a cosine down to `final` · peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    phase = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * phase)))


class Gradients:
    """Computes the gradients of a step.

    On a GPU the first call captures all of it as one CUDA graph, and every further call replays the graph, because the
    kernels of a small model take less time than their launches.

    Args:
        compute: from the tensors of a batch to the loss and to figures, [F].
        parameters: those that get gradients.
        device: where to compute.
    """

    def __init__(
        self, compute: Callable[..., tuple[Tensor, Tensor]], parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        self._compute, self._parameters, self._device = compute, parameters, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shapes: list[torch.Size] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Set the gradients and return the figures, [F]. The graph is captured again for a batch of other shapes."""
        if self._device.type == "cpu":
            for parameter in self._parameters:
                parameter.grad = None
            return self._backward(batch)
        shapes = [tensor.shape for tensor in batch]
        if self._graph is None or shapes != self._shapes:
            self._capture(batch)
            self._shapes = shapes
            assert self._graph is not None
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._figures

    def _backward(self, batch: Batch) -> Tensor:
        loss, figures = self._compute(*batch)
        loss.backward()
        return figures.detach()

    def _capture(self, batch: Batch) -> None:
        self._batch = tuple(tensor.to(self._device) for tensor in batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what a first call allocates or compiles cannot be captured
                for parameter in self._parameters:
                    parameter.grad = None
                self._backward(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for parameter in self._parameters:
            parameter.grad = None
        with torch.cuda.graph(graph):
            self._figures = self._backward(self._batch)
        self._graph = graph


def train(
    name: str,
    steps: int,
    checkpoint: Path,
    log: Log,
    module: nn.Module,
    device: torch.device,
    rate: Callable[[int], float],
    batch_of: Callable[[int], Batch],
    compute: Callable[..., tuple[Tensor, Tensor]],
    figures: Sequence[str],
    average: Average | None = None,
    after_update: Callable[[], None] = lambda: None,
    every: int = 50,
    save_every: int = 300,
) -> None:
    """Train the parameters that want gradients for a number of steps, and continue from a checkpoint if there is one.

    Args:
        name: the name of the stage, for the log.
        steps: the number of steps.
        checkpoint: the file of the checkpoint.
        log: where the figures go.
        module: what is trained.
        device: where it is.
        rate: step -> learning rate.
        batch_of: step -> tensors. Their shapes should change rarely.
        compute: from these tensors, on the device, to the loss and to figures, [F].
        figures: the names of the figures.
        average: the moving average to update after each step.
        after_update: called after each step of the optimizer.
        every: the number of steps between two lines of the log, which have the means of the figures.
        save_every: the number of steps between two checkpoints.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if state := load_checkpoint(checkpoint):
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load(state["average"])
        first = state["step"]
        log(name, resumed_at=first)
    gradients = Gradients(compute, parameters, device)
    sums = torch.zeros(len(figures), device=device)
    begin = time.monotonic()
    for i in range(first, steps):
        torch.manual_seed(1_000_003 * i + sum(map(ord, name)))
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
        sums += gradients(batch_of(i))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_update()
        if average is not None:
            average.update(i)
        if (i + 1) % every == 0 or i + 1 == steps:
            count = (i % every) + 1
            means = dict(zip(figures, (sums / count).tolist(), strict=True))
            log(name, step=i + 1, of=steps, seconds_per_step=(time.monotonic() - begin) / count, **means)
            sums.zero_()
            begin = time.monotonic()
        if (i + 1) % save_every == 0 or i + 1 == steps:
            save_checkpoint(
                checkpoint,
                {
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state if average is not None else {},
                    "step": i + 1,
                },
            )
