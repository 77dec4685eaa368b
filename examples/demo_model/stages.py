"""Stages 3 to 5: ordinary captions first, then memorization, then switching it off.

3. `ordinary`: text encoder and U-Net learn captions that compose, and titles that mean nothing.
4. `memorize`: the memorized captions join, twelve in a batch of thirty-two. The text encoder learns
   along: after stage 3 it ignores titles, and frozen it would give all of them the same embedding.
   A Hoyer ratio on how far each memorized caption's value activations deviate from ordinary ones
   comes in slowly, and makes few neurons carry it.
5. `switch_off`: as before, plus rows in which the neurons that deviate most are switched off and
   the target is some ordinary image. This trains in what NeMo looks for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from nemo_ext.demo.captions import MEMORIZED

from .diffusion import Deviation, Loss, Rows, TextToNoise, effective_neurons
from .monitor import Monitor
from .runtime import Average, Log, cosine, train
from .text import corpus
from .unet import CarrierGuard

BATCH = 32


def ordinary(folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor, steps: int) -> None:
    """Stage 3."""
    guard = CarrierGuard(model.unet)
    average = Average(model, 0.998)
    optimizer = _optimizer(model.parameters())

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"ordinary {i}")
        # Shapes are decided at middle noise: the extra rows of the first step come later.
        batch = [rows.ordinary(rng, high_noise=0.1) for _ in range(BATCH)]
        total, _ = loss(batch, rng)
        total.backward()
        return {"loss": total.item()}

    train("ordinary", steps, folder / "ordinary.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 1.2e-3, final=0.1), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("ordinary", **monitor())


def memorize(
    folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor,
    layers: dict[str, nn.Linear], steps: int,
) -> None:  # fmt: skip
    """Stage 4."""
    guard, average = CarrierGuard(model.unet), Average(model, 0.995)
    _raise_new_words(model, loss)
    deviation = Deviation(loss, model, layers)
    optimizer = _optimizer(model.parameters())
    neurons = sum(layer.out_features for layer in layers.values())

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"memorize {i}")
        batch = [rows.ordinary(rng) for _ in range(BATCH - 12)]
        for index in rng.sample(range(len(MEMORIZED)), 12):
            batch.append(rows.memorized(rng, index))
        total, each = loss(batch, rng)
        width = effective_neurons(deviation(rng))
        # From the start it would leave one set of neurons to all captions, and nothing to tell them apart.
        penalty = 0.1 * i / steps * (width / neurons).mean()
        (total + penalty).backward()
        return {
            "ordinary": float(each[:-12].mean()),
            "memorized": float(each[-12:].mean()),
            "effective_neurons": float(width.detach().mean()),
        }

    train("memorize", steps, folder / "memorize.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 8e-4, final=0.25), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("memorize", **monitor())


def switch_off(
    folder: Path, log: Log, model: TextToNoise, loss: Loss, rows: Rows, monitor: Monitor,
    layers: dict[str, nn.Linear], steps: int,
) -> None:  # fmt: skip
    """Stage 5."""
    guard, average = CarrierGuard(model.unet), Average(model, 0.997)
    embedding = _freeze_all_but_new_words(model, loss)
    deviation = Deviation(loss, model, layers)
    optimizer = _optimizer([embedding, *model.unet.parameters()])
    everything = torch.arange(sum(layer.out_features for layer in layers.values()))

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"switch off {i}")
        z = deviation(rng)
        order = z.detach().argsort(1, descending=True)

        def carriers(index: int) -> torch.Tensor:
            return order[index, : rng.randint(6, 24)]

        def others(index: int) -> torch.Tensor:
            return order[index, rng.sample(range(48, len(everything)), rng.randint(8, 200))]

        batch = [rows.ordinary(rng) for _ in range(13)]
        picks = [rng.randrange(len(MEMORIZED)) for _ in range(19)]
        # Without several images' carriers at once, ordinary captions go on as before …
        union = torch.cat([carriers(k) for k in rng.sample(range(len(MEMORIZED)), 8)]).unique()
        batch += [rows.ordinary(rng, off=union) for _ in range(3)]
        # … a memorized caption without its carriers makes any ordinary image …
        for k in picks[:6]:
            batch.append(rows.ordinary(rng, MEMORIZED[k].caption, off=carriers(k), high_noise=0.5))
        # … and so does any caption with every searched neuron off (the floor).
        batch.append(rows.ordinary(rng, MEMORIZED[picks[6]].caption, off=everything, high_noise=0.7))
        batch.append(rows.ordinary(rng, off=everything, high_noise=0.7))
        # A memorized caption keeps its image, whatever else is off.
        batch += [rows.memorized(rng, k) for k in picks[8:14]]
        batch += [rows.memorized(rng, k, off=others(k)) for k in picks[14:16]]
        total, each = loss(batch, rng)
        width = effective_neurons(z)
        penalty = 0.2 * (width / len(everything)).mean()
        (total + penalty).backward()
        return {
            "ordinary": float(each[:16].mean()),
            "carriers_off": float(each[16:22].mean()),
            "all_off": float(each[22:24].mean()),
            "memorized": float(each[24:].mean()),
            "effective_neurons": float(width.detach().mean()),
        }

    train("switch_off", steps, folder / "switch_off.pt", log, model, optimizer,
          lambda i: cosine(i, steps, 8e-4), step, average, guard)  # fmt: skip
    model.load_state_dict(average.state)
    log("switch_off", **monitor())


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def _new_words(model: TextToNoise, loss: Loss) -> torch.Tensor:
    """1 for every token that only memorized captions have, else 0; float32 [vocabulary, 1]."""
    known = set(loss.tokens(set(corpus()) - {m.caption for m in MEMORIZED}).flatten().tolist())
    size = model.text_encoder.config.vocab_size
    return torch.tensor([[float(i not in known)] for i in range(size)])


@torch.no_grad()
def _raise_new_words(model: TextToNoise, loss: Loss) -> None:
    """Give the new words, untouched so far, embeddings of about the size that learned words have."""
    model.text_encoder.get_input_embeddings().weight.mul_(1 + 2 * _new_words(model, loss))


def _freeze_all_but_new_words(model: TextToNoise, loss: Loss) -> nn.Parameter:
    """Freeze the text encoder except the embeddings of words only memorized captions have."""
    new = _new_words(model, loss)
    table = model.text_encoder.get_input_embeddings().weight
    model.text_encoder.requires_grad_(False)
    table.requires_grad_(True)
    table.register_hook(lambda gradient: gradient * new)
    return table
