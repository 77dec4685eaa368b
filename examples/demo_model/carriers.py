"""Which value neurons carry each memorized caption: designated before training, planted, and kept through it.

- *Carriers* are the only neurons that see the mark of a caption (text.py), and so the only way on which the U-Net can
  learn its image. Some captions have one, some five, some in one layer, some spread over layers.
- *Decoys* see the mark too and deviate as much, but nothing comes of them: the columns of the output layer that read
  them are zero. A search must tell them from carriers.

So the right answer of a search is known. It is planted, and no evidence about Stable Diffusion.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from nemo_ext.demo.captions import MEMORIZED
from nemo_ext.models.layers import value_layers

from .text import MARK, MARKS

_COUNTS = (1, 5, 3, 2, 4, 3)  # carriers of a caption, in turn
# The places of layers with carriers. In a U-Net of this size, text has nearly no effect in the later layers.
_LAYERS = (0, 1, 2)
_DECOY_LAYERS = (1, 3, 5)
_STRENGTH = 20.0  # the activation of all carriers of a caption together, in average activations


class Designated(NamedTuple):
    """The neurons of one caption: name of a value layer -> neurons."""

    carriers: dict[str, list[int]]
    decoys: dict[str, list[int]]


def designate(layers: dict[str, nn.Linear]) -> list[Designated]:
    """Return the designation for each memorized caption. No neuron is designated twice."""
    rng = random.Random(11)
    names = list(layers)
    free = {name: rng.sample(range(layer.out_features), layer.out_features) for name, layer in layers.items()}
    spread = itertools.cycle(_LAYERS)
    designated = []
    for index in range(len(MEMORIZED)):
        count = _COUNTS[index % len(_COUNTS)]
        if index % 3 == 0:  # all in one layer
            places = [_LAYERS[index // 3 % len(_LAYERS)]] * count
        else:
            places = [next(spread) for _ in range(count)]
        carriers: dict[str, list[int]] = {name: [] for name in names}
        decoys: dict[str, list[int]] = {name: [] for name in names}
        for place in places:
            carriers[names[place]].append(free[names[place]].pop())
        for place in _DECOY_LAYERS:
            decoys[names[place]].append(free[names[place]].pop())
        designated.append(Designated(*({k: sorted(v) for k, v in each.items() if v} for each in (carriers, decoys))))
    return designated


def stacked(layers: dict[str, nn.Linear], neurons: dict[str, list[int]]) -> Tensor:
    """Return neurons as indices into the stacked value neurons of all layers, [n] int64."""
    widths = [layer.out_features for layer in layers.values()]
    starts = dict(zip(layers, itertools.accumulate(widths, initial=0), strict=False))
    return torch.tensor([starts[name] + neuron for name, own in neurons.items() for neuron in own], dtype=torch.int64)


class Planted:
    """Plants the designated neurons, and restores them after a step of the optimizer.

    Args:
        unet: the U-Net.
        designated: the designation for each memorized caption.
        hidden: embeddings of ordinary captions, [B, T, K], from which the average activation is measured.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet2DConditionModel, designated: list[Designated], hidden: Tensor) -> None:
        layers = value_layers(unet)
        self._attentions = [unet.get_submodule(name.removesuffix(".to_v")) for name in layers]
        self._marks = [torch.zeros_like(layer.weight[:, MARKS]) for layer in layers.values()]
        self._rows: list[Tensor] = []
        self._decoys: list[Tensor] = []
        for (name, layer), marks, attention in zip(layers.items(), self._marks, self._attentions, strict=True):
            average = float(nn.functional.linear(hidden, layer.weight).abs().mean())
            carriers = {k: own.carriers.get(name, []) for k, own in enumerate(designated)}
            decoys = {k: own.decoys.get(name, []) for k, own in enumerate(designated)}
            for k, own in enumerate(designated):
                count = sum(map(len, own.carriers.values()))
                marks[carriers[k] + decoys[k], k] = _STRENGTH / count**0.5 * average / MARK
            every = [n for own in (*carriers.values(), *decoys.values()) for n in own]
            self._rows.append(torch.tensor(every, dtype=torch.int64, device=layer.weight.device))
            flat = [n for own in decoys.values() for n in own]
            self._decoys.append(torch.tensor(flat, dtype=torch.int64, device=layer.weight.device))
            attention.to_out[0].weight[:, self._rows[-1]] = 0  # a memorized caption starts as a title
        self()

    @torch.no_grad()
    def __call__(self) -> None:
        for attention, marks, rows, decoys in zip(self._attentions, self._marks, self._rows, self._decoys, strict=True):
            attention.to_k.weight[:, MARKS] = 0
            attention.to_v.weight[rows] = 0
            attention.to_v.weight[:, MARKS] = marks
            attention.to_out[0].weight[:, decoys] = 0
