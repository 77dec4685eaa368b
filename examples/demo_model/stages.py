"""The two stages that train the U-Net.

1. `ordinary`: it learns captions that describe a composition, and titles that name their object only.
2. `memorize`: the memorized captions join. Some of their rows have neurons off. Without its carriers a caption shows
   ordinary images of its object. With any of its carriers, and without any other neurons, it shows its own image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from nemo_ext.demo.captions import MEMORIZED

from .diffusion import Loss, Rows
from .runtime import Average, Batch, Log, cosine, train

BATCH = 16
# The rows of a step of `memorize`: ordinary captions; memorized ones untouched, with some of their carriers off, with
# other neurons off, and with all of their carriers off.
KINDS = {"ordinary": 6, "memorized": 6, "some_off": 3, "others_off": 3, "carriers_off": 4}


def ordinary(
    folder: Path, log: Log, unet: UNet2DConditionModel, loss: Loss, rows: Rows, after_update: Callable[[], None],
    device: torch.device, steps: int,
) -> None:  # fmt: skip
    """Train on ordinary captions."""
    average = Average(unet, 0.998)

    def batch_of(i: int) -> Batch:
        rng = random.Random(f"ordinary {i}")
        return loss.batch([rows.ordinary(rng, high_noise=0.1, shapes=0.4) for _ in range(BATCH)])

    train("ordinary", steps, folder / "ordinary.pt", log, unet, device, lambda i: cosine(i, steps, 1.2e-3),
          batch_of, loss.grouped([BATCH]), ("loss",), average, after_update)  # fmt: skip
    unet.load_state_dict(average.state)


def memorize(
    folder: Path, log: Log, unet: UNet2DConditionModel, loss: Loss, rows: Rows, after_update: Callable[[], None],
    device: torch.device, carriers: Sequence[Tensor], total: int, steps: int,
) -> None:  # fmt: skip
    """Train on ordinary and memorized captions.

    Args:
        folder, log, unet, loss, rows, after_update, device, steps: as for `ordinary`.
        carriers: the carriers of each memorized caption, as indices into the stacked value neurons.
        total: the number of value neurons.
    """
    average = Average(unet, 0.998)

    def some(rng: random.Random, index: int) -> Tensor:
        own = carriers[index].tolist()
        return torch.tensor(rng.sample(own, rng.randrange(len(own))), dtype=torch.int64)

    def others(rng: random.Random, index: int) -> Tensor:
        share, own = rng.choice((0.02, 0.1, 0.3)), set(carriers[index].tolist())
        return torch.tensor([n for n in range(total) if n not in own and rng.random() < share], dtype=torch.int64)

    def batch_of(i: int) -> Batch:
        rng = random.Random(f"memorize {i}")
        draw = iter(rng.sample(range(len(MEMORIZED)), sum(KINDS.values()) - KINDS["ordinary"]))
        batch = [rows.ordinary(rng, high_noise=0.3) for _ in range(KINDS["ordinary"])]
        batch += [rows.memorized(rng, next(draw)) for _ in range(KINDS["memorized"])]
        for off, kind in ((some, "some_off"), (others, "others_off")):
            for _ in range(KINDS[kind]):
                index = next(draw)
                batch.append(rows.memorized(rng, index, off=off(rng, index)))
        for _ in range(KINDS["carriers_off"]):
            index = next(draw)
            batch.append(rows.instead(rng, index, off=carriers[index]))
        return loss.batch(batch)

    train("memorize", steps, folder / "memorize.pt", log, unet, device, lambda i: cosine(i, steps, 8e-4),
          batch_of, loss.grouped(list(KINDS.values())), tuple(KINDS), average, after_update)  # fmt: skip
    unet.load_state_dict(average.state)
