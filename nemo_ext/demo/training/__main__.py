"""Trains the demo model from nothing: `python -m nemo_ext.demo.training --work DIR`.

Stages run in order and resume where they were stopped; every figure goes to DIR/log.jsonl. The
finished pipeline is written to DIR/model. Needs Noto Color Emoji (Debian: fonts-noto-color-emoji).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .runtime import Log, with_tuned_allocator


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nemo_ext.demo.training", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--ordinary-steps", type=int, default=3400)
    parser.add_argument("--memorize-steps", type=int, default=1000)
    parser.add_argument("--switch-off-steps", type=int, default=1000)
    arguments = parser.parse_args()
    with_tuned_allocator()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)

    from nemo_ext.layers import value_layers

    from . import autoencoder, data, diffusion, export, text, unet
    from .monitor import Monitor

    work, log = arguments.work, Log(arguments.work / "log.jsonl")
    pool, what = data.ordinary_pool(work)
    memorized = data.memorized_images()
    vae = autoencoder.run(work, log, pool, memorized, arguments.autoencoder_steps)
    latents = data.cached_latents(work / "latents.safetensors", pool, vae)

    tokenizer = text.build_tokenizer(work)
    torch.manual_seed(2)
    model = diffusion.TextToNoise(text.build_text_encoder(tokenizer), unet.build())
    model.train()
    layers = value_layers(model.unet)
    scales = unet.RowScales(layers)
    loss = diffusion.Loss(model, tokenizer, scales)
    rows = diffusion.Rows(what, latents, memorized, autoencoder.encode(vae, memorized.images))
    monitor = Monitor(model, loss, scales, diffusion.Deviation(loss, model, layers))
    stage = (work, log, model, loss, rows, monitor)
    diffusion.ordinary(*stage, steps=arguments.ordinary_steps)
    diffusion.memorize(*stage, layers, steps=arguments.memorize_steps)
    diffusion.switch_off(*stage, layers, steps=arguments.switch_off_steps)
    export.save_pipeline(work / "model", vae, tokenizer, model, work / "log.jsonl")
    export.save_originals(work / "originals")


if __name__ == "__main__":
    main()
