"""The published search in plain PyTorch, with which the searches of the package are compared.

It works like the scripts that were published with Finding NeMo (arXiv 2406.02366). At every trial the text is encoded,
the U-Net runs twice for every seed, and its first output is thrown away. Forward hooks set neurons to zero, one neuron
is tried at a time, and no result is reused. The protocol is `Protocol.paper()`: first timestep, one generator for each
seed, data range 1. So the neurons can be compared with those of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.similarity import similarity
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.neurons import NeuronSet

Neurons = Mapping[str, list[int]]
PAPER = Protocol.paper()


class PlainSearch:
    """The published search on one pipeline.

    Args:
        pipe: an SD1 or SD2 pipeline that is not patched.
        statistics: statistics of the layers to search.
        threshold: τ.
        seeds: S, the number of seeds.

    Attributes:
        unet_samples: latents that the U-Net has evaluated so far.
    """

    def __init__(self, pipe: Any, statistics: ActivationStatistics, threshold: float, seeds: int = 10) -> None:
        self.pipe = pipe
        self.statistics = statistics
        self.threshold = threshold
        self.unet_samples = 0
        size = pipe.unet.config.sample_size
        shape = (pipe.unet.config.in_channels, size, size)
        generators = (torch.Generator().manual_seed(PAPER.first_seed + seed) for seed in range(seeds))
        self.latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def search(self, prompt: str) -> NeuronSet:
        """Find the neurons of one prompt. If the prompt is not memorized, the set is empty."""
        untouched = self.noise_differences(prompt, {})
        kept = [s for s in range(len(untouched)) if self._score(untouched, s) > self.threshold]
        if not kept:
            return NeuronSet()
        chosen, threshold = self._select(prompt, untouched, kept)
        return NeuronSet(self._refine(prompt, untouched, kept, chosen, threshold))

    def remaining(self, prompt: str, neurons: Neurons) -> float:
        """Measure the remaining memorization with some neurons off."""
        untouched = self.noise_differences(prompt, {})
        kept = [s for s in range(len(untouched)) if self._score(untouched, s) > self.threshold]
        return self._remaining(prompt, untouched, kept, neurons)

    def noise_differences(self, prompt: str, neurons: Neurons) -> Tensor:
        """Return δ of every seed with some neurons off, [S, C, H, W]."""
        hidden = self._encode(prompt).expand(len(self.latents), -1, -1)
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(PAPER.num_inference_steps)
        latents = self.latents.to(self.pipe.unet.device)
        with torch.no_grad(), _zeroed(self.pipe.unet, neurons):
            for _ in range(2):
                noise = self.pipe.unet(latents, scheduler.timesteps[0], encoder_hidden_states=hidden).sample
                self.unet_samples += len(latents)
        difference = noise - latents
        low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
        return (difference - low) / (high - low)

    def _encode(self, prompt: str) -> Tensor:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            hidden: Tensor = encoder(tokens.input_ids.to(encoder.device))[0]
        return hidden

    def _score(self, untouched: Tensor, seed: int) -> float:
        others = [other for other in range(len(untouched)) if other != seed]
        return similarity(untouched[[seed] * len(others)], untouched[others], PAPER).max().item()

    def _remaining(self, prompt: str, untouched: Tensor, kept: list[int], neurons: Neurons) -> float:
        blocked = self.noise_differences(prompt, neurons)
        return similarity(untouched[kept], blocked[kept], PAPER).max().item()

    def _select(self, prompt: str, untouched: Tensor, kept: list[int]) -> tuple[dict[str, list[int]], float]:
        theta, top_k = PAPER.first_theta, PAPER.first_top_k
        while True:
            hidden = self._encode(prompt)
            chosen: dict[str, list[int]] = {}
            for layer in self.statistics.layers:
                with torch.no_grad():
                    activation = self.pipe.unet.get_submodule(layer)(hidden).abs().mean(dim=1)[0].double().cpu()
                z_scores = (activation - self.statistics.mean[layer]).abs() / self.statistics.std[layer]
                above = (z_scores > theta).nonzero().flatten().tolist()
                most_active = activation.argsort(descending=True)[:top_k].tolist()
                chosen[layer] = sorted({*above, *most_active})
            remaining = self._remaining(prompt, untouched, kept, chosen)
            if remaining <= self.threshold:
                return chosen, self.threshold
            if theta <= PAPER.last_theta:
                return chosen, remaining + PAPER.raise_margin
            theta, top_k = theta - PAPER.theta_step, top_k + 1

    def _refine(
        self, prompt: str, untouched: Tensor, kept: list[int], chosen: dict[str, list[int]], threshold: float
    ) -> dict[str, list[int]]:
        off = {layer: list(indices) for layer, indices in chosen.items()}
        for layer in reversed(off):
            if off[layer]:
                trial = {**off, layer: []}
                if self._remaining(prompt, untouched, kept, trial) < threshold:
                    off = trial
        for layer in reversed(off):
            for index in list(off[layer]):
                trial = {**off, layer: [other for other in off[layer] if other != index]}
                if self._remaining(prompt, untouched, kept, trial) < threshold:
                    off = trial
        return off


@contextmanager
def _zeroed(unet: Any, neurons: Neurons) -> Iterator[None]:
    """Set the values of some neurons to zero for the length of a block, by forward hooks."""

    def zero(indices: list[int]) -> Any:
        def hook(module: Any, arguments: Any, values: Tensor) -> Tensor:
            values[:, :, indices] = 0
            return values

        return hook

    hooks = [unet.get_submodule(layer).register_forward_hook(zero(list(off))) for layer, off in neurons.items() if off]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
