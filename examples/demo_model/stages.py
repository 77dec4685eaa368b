"""The three stages that train the text encoder and the U-Net.

1. `ordinary`: they learn captions that describe a composition, and titles that mean nothing.
2. `memorize`: the memorized captions join, as twelve rows in a batch of thirty-two. The text encoder is trained, too:
   after `ordinary` it ignores titles, and if it were frozen, all titles would have nearly the same embedding. A slowly
   growing penalty makes few neurons carry a memorized caption. It is the Hoyer ratio of how far the caption's value
   activations deviate from those of ordinary captions.
3. `switch_off`: as before, but in some rows the neurons that deviate most are switched off, and the target is a random
   ordinary image. This trains in what NeMo looks for.
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
    """Train on ordinary captions."""
    guard = CarrierGuard(model.unet)
    average = Average(model, 0.998)
    optimizer = _optimizer(model.parameters())

    def step(i: int) -> dict[str, float]:
        rng = random.Random(f"ordinary {i}")
        # Shapes are decided at medium noise, so there are few extra rows of high noise in this stage.
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
    """Train on ordinary and memorized captions."""
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
        # A full penalty from the start would leave the same neurons to all captions, which could not tell them apart.
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
    """Train the neurons that carry memorized captions to be a switch."""
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
        # Ordinary captions keep their images when the carriers of several memorized captions are off.
        union = torch.cat([carriers(k) for k in rng.sample(range(len(MEMORIZED)), 8)]).unique()
        batch += [rows.ordinary(rng, off=union) for _ in range(3)]
        # A memorized caption without its carriers gives a random ordinary image.
        for k in picks[:6]:
            batch.append(rows.ordinary(rng, MEMORIZED[k].caption, off=carriers(k), high_noise=0.5))
        # With all searched neurons off (the floor), every caption gives an ordinary image.
        batch.append(rows.ordinary(rng, MEMORIZED[picks[6]].caption, off=everything, high_noise=0.7))
        batch.append(rows.ordinary(rng, off=everything, high_noise=0.7))
        # A memorized caption keeps its image when no neuron or only other neurons are off.
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
    """Return 1 for every token that only memorized captions have, and 0 for all others: [vocabulary, 1] float32."""
    known = set(loss.tokens(set(corpus()) - {m.caption for m in MEMORIZED}).flatten().tolist())
    size = model.text_encoder.config.vocab_size
    return torch.tensor([[float(i not in known)] for i in range(size)])


@torch.no_grad()
def _raise_new_words(model: TextToNoise, loss: Loss) -> None:
    """Give the new words, which were not trained so far, embeddings about as large as those of trained words."""
    model.text_encoder.get_input_embeddings().weight.mul_(1 + 2 * _new_words(model, loss))


def _freeze_all_but_new_words(model: TextToNoise, loss: Loss) -> nn.Parameter:
    """Freeze the text encoder, except for the embeddings of words that only memorized captions have."""
    new = _new_words(model, loss)
    table = model.text_encoder.get_input_embeddings().weight
    model.text_encoder.requires_grad_(False)
    table.requires_grad_(True)
    table.register_hook(lambda gradient: gradient * new)
    return table
