"""Trains the demo model from random weights: `python -m examples.demo_model.train --work DIR`.

The stages run one after another. If the command is stopped, the same command continues from the last checkpoint. All
figures are written to DIR/log.jsonl, and the finished pipeline to DIR/model. The font Noto Color Emoji must be
installed (Debian: fonts-noto-color-emoji).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .runtime import Log, with_tuned_allocator


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_model.train", description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder for checkpoints, log and results"
    )
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (default: 2)")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=3000, metavar="N", help="steps of this stage (default: 3000)"
    )
    parser.add_argument(
        "--ordinary-steps", type=int, default=3400, metavar="N", help="steps of this stage (default: 3400)"
    )
    parser.add_argument(
        "--memorize-steps", type=int, default=1000, metavar="N", help="steps of this stage (default: 1000)"
    )
    parser.add_argument(
        "--switch-off-steps", type=int, default=1000, metavar="N", help="steps of this stage (default: 1000)"
    )
    arguments = parser.parse_args()
    with_tuned_allocator()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)

    # These imports come after the restart above, because the restarted process would repeat them.
    from nemo_ext.models.layers import value_layers

    from . import autoencoder, data, diffusion, export, stages, text, unet
    from .monitor import Monitor

    work, log = arguments.work, Log(arguments.work / "log.jsonl")
    pool, what = data.ordinary_pool(work)
    memorized = data.memorized_images()
    vae = autoencoder.run(work, log, pool, memorized, arguments.autoencoder_steps)
    latents = autoencoder.cached_latents(work / "latents.safetensors", pool, vae)

    tokenizer = text.build_tokenizer(work)
    torch.manual_seed(2)
    model = diffusion.TextToNoise(text.build_text_encoder(tokenizer), unet.build())
    model.train()
    layers = value_layers(model.unet)
    scales = unet.RowScales(layers)
    loss = diffusion.Loss(model, tokenizer, scales)
    rows = diffusion.Rows(what, latents, memorized, autoencoder.encode(vae, memorized.images))
    monitor = Monitor(model, loss, scales, diffusion.Deviation(loss, model, layers))
    given = (work, log, model, loss, rows, monitor)
    stages.ordinary(*given, steps=arguments.ordinary_steps)
    stages.memorize(*given, layers, steps=arguments.memorize_steps)
    stages.switch_off(*given, layers, steps=arguments.switch_off_steps)
    export.save_pipeline(work / "model", vae, tokenizer, model, work / "log.jsonl")
    export.save_originals(work / "originals")


if __name__ == "__main__":
    main()
