"""What every training stage needs: settings of the allocator, a log, checkpoints, and the training loop."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Without these settings page faults dominate training on the CPU: glibc returns large blocks to the system after every
# step and requests them again in the next one. This makes a step five to ten times slower (measured).
_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def autocast() -> torch.autocast:
    """bfloat16 where the CPU multiplies it fast; else float32, because without such instructions bfloat16 is slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


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
    """Return the state that was saved at `path`, or None if there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


class Average:
    """The exponential moving average of the parameters of a module, in float32."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """Include the parameters after `step`."""
        # In the first steps, a fixed decay would give the initial weights too much influence.
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


def cosine(step: int, steps: int, peak: float, warmup: int = 50, final: float = 0.02) -> float:
    """Return the learning rate at `step`: a linear warm-up, then half a cosine down to `final` · peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    phase = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * phase)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def train(
    name: str,
    steps: int,
    checkpoint: Path,
    log: Log,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    step: Callable[[int], dict[str, float]],
    average: Average | None = None,
    after_update: Callable[[], None] = lambda: None,
    every: int = 50,
    save_every: int = 300,
) -> None:
    """Train for a number of steps, and continue from a checkpoint if there is one.

    Args:
        name: the name of the stage, for the log.
        steps: the number of steps.
        checkpoint: the file of the checkpoint.
        log: where the figures go.
        module: what is trained.
        optimizer: its optimizer.
        rate: step -> learning rate.
        step: computes gradients for a step, and returns figures to log.
        average: the moving average to update after each step.
        after_update: called after each step of the optimizer.
        every: the number of steps between two lines of the log, which have the means of the figures.
        save_every: the number of steps between two checkpoints.
    """
    first = 0
    if state := load_checkpoint(checkpoint):
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.state = state["average"]
        first = state["step"]
        log(name, resumed_at=first)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums: dict[str, float] = {}
    begin = time.monotonic()
    for i in range(first, steps):
        torch.manual_seed(1_000_003 * i + sum(map(ord, name)))
        set_rate(optimizer, rate(i))
        optimizer.zero_grad(set_to_none=True)
        for key, value in step(i).items():
            sums[key] = sums.get(key, 0.0) + value
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_update()
        if average is not None:
            average.update(module, i)
        if (i + 1) % every == 0 or i + 1 == steps:
            count = (i % every) + 1
            elapsed = time.monotonic() - begin
            figures = {key: value / count for key, value in sums.items()}
            log(name, step=i + 1, of=steps, seconds_per_step=elapsed / count, **figures)
            sums, begin = {}, time.monotonic()
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
