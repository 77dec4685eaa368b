"""Measures what a patched pipeline costs: 25 steps untouched, patched, with neurons off, and with hooks that zero them.

Run `python benchmarks/bench_generation.py [--device cpu|cuda] [--quick] [--threads N] [--out DIR]`. First the results
are verified: patching alone must not change a bit, and neurons that are off must give the same as hooks. Then the calls
alternate. `untouched again` runs the same as `untouched`, so that its ratio shows the noise. The scope `value layers`
measures these layers alone. They are all that patching can change, and often take less of a generation than the noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from harness import Panel, Run, alternate, measured, parser
from sd1 import TOKENS, WIDTH, initialized, unet_without_weights
from torch import Tensor, nn

from nemo_ext.demo.captions import MEMORIZED
from nemo_ext.demo.run import GUIDANCE, STEPS, load_demo_pipeline
from nemo_ext.models.layers import value_layers
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patch

OFF_PER_LAYER = 4


class Model(NamedTuple):
    """A pipeline, and how it is measured.

    Attributes:
        pipe: the pipeline.
        tokens: T, the number of tokens of its texts.
        arguments: number of images in one call -> arguments of the pipeline.
        images: the numbers of images in one call that are measured.
        rounds: how many rounds of generations are measured. A round has one call of each side.
    """

    pipe: StableDiffusionPipeline
    tokens: int
    arguments: Callable[[int], dict[str, Any]]
    images: tuple[int, ...]
    rounds: int


def demo(device: str) -> Model:
    """Return the bundled model, from the caption to the image."""
    caption = MEMORIZED[0].caption
    pipe = load_demo_pipeline().to(device)
    return Model(pipe, pipe.tokenizer.model_max_length, lambda images: {"prompt": [caption] * images}, (1, 4), 15)


def quarter(device: str) -> Model:
    """Return Stable Diffusion 1's U-Net with a quarter of its width, 32x32 latents, random weights and random texts.

    Its value layers do 2.7 % of its work. This is fifteen times their share at full width and 64x64 latents.
    """
    unet = initialized(unet_without_weights(narrower=4, latent_size=32))
    texts = torch.randn(2, 1, TOKENS, WIDTH, device=device)
    return Model(
        with_unet(load_demo_pipeline(), unet).to(device),
        TOKENS,
        lambda images: {
            "prompt_embeds": texts[0].expand(images, -1, -1),
            "negative_prompt_embeds": texts[1].expand(images, -1, -1),
            "output_type": "latent",
        },
        (1,),
        5,
    )


def with_unet(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return a pipeline with another U-Net and the other components of `pipe`."""
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def twin(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Return a pipeline with modules of its own that share the weights, so that no side has a better place in RAM."""
    return with_unet(pipe, copy.deepcopy(pipe.unet, {id(weight): weight for weight in pipe.unet.parameters()}))


def sides(pipe: StableDiffusionPipeline) -> dict[str, StableDiffusionPipeline]:
    """Return the pipelines to compare: name -> pipeline."""
    layers = value_layers(pipe, "all")
    neurons = NeuronSet({layer: range(OFF_PER_LAYER) for layer in layers})
    pipes = {name: twin(pipe) for name in ("untouched", "untouched again", "patched", "off", "hooks")}
    patch(pipes["patched"])
    patch(pipes["off"], neurons)
    for layer, module in value_layers(pipes["hooks"], "all").items():
        module.register_forward_hook(zeroing(torch.tensor(neurons[layer], device=module.weight.device)))
    return pipes


def zeroing(indices: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that switches neurons off with as little work as possible."""

    def hook(module: nn.Module, inputs: Any, values: Tensor) -> None:
        values.index_fill_(-1, indices, 0)

    return hook


def verify(results: dict[str, Tensor]) -> None:
    """Raise an AssertionError if the results of the sides are not as they must be."""
    assert torch.equal(results["untouched"], results["untouched again"]), "a generation differs from run to run"
    assert torch.equal(results["patched"], results["untouched"]), "patching alone has changed the result"
    # Rounding errors grow over the steps. The neurons that are off must have a much larger effect.
    error = (results["off"] - results["hooks"]).abs().max()
    effect = (results["off"] - results["untouched"]).abs().max()
    assert error < effect / 20, (
        f"neurons off and hooks differ by {error:.2g}, and neurons off and untouched by {effect:.2g}"
    )


def generation(model: Model, images: int, steps: int) -> Callable[[StableDiffusionPipeline], Tensor]:
    """Return a function that generates images with a pipeline."""

    def run(pipe: StableDiffusionPipeline) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        result: Tensor = pipe(**options | model.arguments(images), generator=generators).images
        return result

    return run


def projections(model: Model, images: int, steps: int) -> Callable[[StableDiffusionPipeline], Tensor]:
    """Return a function that calls only the value layers of a pipeline, with the same texts at each step."""
    width = model.pipe.unet.config.cross_attention_dim
    texts = torch.randn(2 * images, model.tokens, width, device=model.pipe.device)

    @torch.no_grad()
    def run(pipe: StableDiffusionPipeline) -> Tensor:
        layers, text = value_layers(pipe, "all").values(), texts.clone()
        for _ in range(steps):
            values = [layer(text) for layer in layers]
        return torch.cat(values, dim=-1)

    return run


def main() -> None:
    run = Run(
        "bench_generation",
        parser(__doc__),
        keys=("model", "images", "steps", "scope", "what"),
        shown=("calls", "median_ms", "over_untouched", "over_untouched_low", "over_untouched_high", "over_hooks"),
    )
    steps = 5 if run.quick else STEPS
    for make in (demo,) if run.quick else (demo, quarter):
        model = make(run.device)
        pipes = sides(model.pipe)
        for images in model.images[:1] if run.quick else model.images:
            for scope, of, rounds in (
                ("generation", generation(model, images, steps), 5 if run.quick else model.rounds),
                ("value layers", projections(model, images, steps), 50),
            ):
                calls = {name: partial(of, pipe) for name, pipe in pipes.items()}
                times = alternate(calls, device=run.device, verify=verify, rounds=rounds)
                keys = {"model": make.__name__, "images": images, "steps": steps, "scope": scope}
                for what, row in measured(times, baselines=["untouched", "hooks"]).items():
                    run.add({**keys, "what": what, **row})
    panels = dict.fromkeys((row["model"], row["scope"]) for row in run.rows)
    run.finish(
        [
            Panel(
                f"{model}, {scope}: untouched / this",
                [
                    row | {"of": f"{row['images']} at once"}
                    for row in run.rows
                    if (row["model"], row["scope"]) == (model, scope)
                ],
                x="what",
                y="over_untouched",
                series="of",
            )
            for model, scope in panels
        ]
    )


if __name__ == "__main__":
    main()
