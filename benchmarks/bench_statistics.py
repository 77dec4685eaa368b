"""Compares `collect_statistics` with a plain loop, from the text of prompts to their activation statistics.

Run `python benchmarks/bench_statistics.py [--device cpu|cuda] [--quick] [--threads N] [--out DIR] [--compare CSV]`. The
loop works like the published script of the method: it processes one prompt and one linear layer at a time, and keeps
all activations until the end. benchmarks/README.md describes the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import Panel, Row, Run, alternate, measured, parser, peak_memory
from sd1 import initialized, text_encoder, tokenizer, unet_without_weights
from torch import Tensor, nn

from nemo_ext.demo.captions import ordinary_captions
from nemo_ext.demo.run import load_demo_pipeline
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.models.layers import value_layers

Summary = dict[str, tuple[Tensor, Tensor]]


class Components(NamedTuple):
    """The components of a pipeline that statistics need."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: nn.Module
    config: Any


def demo() -> Any:
    """Return the bundled pipeline."""
    return load_demo_pipeline()


def sd1() -> Components:
    """Return Stable Diffusion 1's text encoder and value layers with random weights; its other layers have none."""
    unet = unet_without_weights()
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_v"):
            initialized(module)
    return Components(tokenizer(), text_encoder(), unet, unet.config)


MODELS: dict[str, Callable[[], Any]] = {"demo": demo, "sd1": sd1}


def load(model: str, device: str) -> Any:
    """Return a model of `MODELS` whose text encoder and value layers are on a device."""
    pipe = MODELS[model]()
    pipe.text_encoder.to(device)
    for layer in value_layers(pipe, "all").values():
        layer.to(device)
    return pipe


def plain_loop(pipe: Any, prompts: list[str], layers: Any = "down+mid") -> Summary:
    """Do what `collect_statistics` does, in a plain loop. Return layer name -> (mean, std)."""
    found = value_layers(pipe, layers)
    kept: dict[str, list[Tensor]] = {name: [] for name in found}
    with torch.no_grad():
        for prompt in prompts:
            tokens = pipe.tokenizer(
                prompt,
                padding="max_length",
                max_length=pipe.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            hidden = pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]
            for name, layer in found.items():
                kept[name].append(layer(hidden).abs().mean(dim=1))
    together = {name: torch.cat(activations) for name, activations in kept.items()}
    return {name: (activation.mean(dim=0), activation.std(dim=0)) for name, activation in together.items()}


def agree(results: dict[str, Any]) -> None:
    """Raise an AssertionError if mean and std differ by more than the float32 rounding of activations."""
    ours: ActivationStatistics = results["collect"]
    for name, (mean, std) in results["loop"].items():
        torch.testing.assert_close(ours.mean[name], mean.double().cpu(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.std[name], std.double().cpu(), rtol=1e-2, atol=1e-5)


def captions(number: int) -> list[str]:
    """Return captions. They are all different as far as there are enough."""
    different = [caption for _, caption in ordinary_captions(min(number, 2304), seed=2024)]
    return (different * math.ceil(number / len(different)))[:number]


def measure_time(pipe: Any, model: str, number: int, layers: Any, run: Run) -> None:
    """Time both sides on a number of captions, and add their rows to the run."""
    prompts = captions(number)
    calls = {
        "loop": lambda: plain_loop(pipe, prompts, layers),
        "collect": lambda: collect_statistics(pipe, prompts, layers=layers),
    }
    demo = model == "demo"  # the large model takes seconds, so it is not warmed up
    rounds = (5 if run.quick else 15) if demo else 3 - run.quick
    times = alternate(calls, device=run.device, verify=agree, rounds=rounds, warm_up=demo)
    for what, row in measured(times, baselines=["loop"]).items():
        prompts_per_s = 1e3 * number / row["median_ms"]
        run.add({**keys(what, model, number, pipe, layers), **row, "prompts_per_s": prompts_per_s})


def keys(what: str, model: str, number: int, pipe: Any, layers: Any = "down+mid") -> Row:
    """Return the columns that identify a measurement."""
    neurons = sum(layer.out_features for layer in value_layers(pipe, layers).values())
    return {"what": what, "model": model, "prompts": number, "neurons": neurons}


def loop_of_demo(number: int, device: str) -> None:
    plain_loop(load("demo", device), captions(number))


def collect_of_demo(number: int, device: str) -> None:
    collect_statistics(load("demo", device), captions(number))


def main() -> None:
    run = Run(
        "bench_statistics",
        parser(__doc__),
        keys=("what", "model", "prompts", "neurons"),
        shown=("median_ms", "prompts_per_s", "over_loop", "over_loop_low", "over_loop_high", "peak_mib"),
    )

    pipe = load("demo", run.device)
    for number in (64,) if run.quick else (16, 64, 256, 1024):
        measure_time(pipe, "demo", number, "down+mid", run)
    large = load("sd1", run.device)
    searched = list(value_layers(large))
    for layers in (searched,) if run.quick else (searched[:1], searched[:3], searched, "all"):
        measure_time(large, "sd1", 8 if run.quick else 32, layers, run)
    del large
    memory = {"collect": (collect_of_demo, (100, 1000) if run.quick else (1000, 10000, 50000))}
    if not run.quick:
        memory["loop"] = (loop_of_demo, (1000, 10000))  # 10,000 prompts suffice to show that it grows
    for what, (call, numbers) in memory.items():
        for number in numbers:
            peak, _ = peak_memory(call, number, run.device, device=run.device)
            run.add({**keys(what, "demo", number, pipe), "peak_mib": peak / 2**20})

    run.finish(
        [
            Panel("demo: time", [row for row in run.rows if row["model"] == "demo"], x="prompts"),
            Panel("sd1: time", [row for row in run.rows if row["model"] == "sd1"], x="neurons"),
            Panel("demo: memory of the process", run.rows, x="prompts", y="peak_mib"),
        ]
    )


if __name__ == "__main__":
    main()
