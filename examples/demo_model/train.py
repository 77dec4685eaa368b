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

#: Stage -> number of steps.
STEPS = {"autoencoder": 2500, "text": 900, "marks": 1200, "ordinary": 5500, "memorize": 2800}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_model.train", description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder for checkpoints, log and results"
    )
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (default: 2)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to train; a GPU takes minutes (default: cpu)"
    )
    for stage, steps in STEPS.items():
        parser.add_argument(
            f"--{stage}-steps", type=int, default=steps, metavar="N", help=f"steps of this stage (default: {steps})"
        )
    arguments = parser.parse_args()
    with_tuned_allocator()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)

    # These imports come after the restart above, because the restarted process would repeat them.
    from nemo_ext.demo.captions import PHRASINGS, ordinary_captions
    from nemo_ext.models.layers import value_layers

    from . import autoencoder, carriers, data, diffusion, export, stages, text, unet
    from .monitor import Monitor

    work, log, device = arguments.work, Log(arguments.work / "log.jsonl"), torch.device(arguments.device)
    pool, what = data.ordinary_pool(work, arguments.threads)
    memorized = data.memorized_images()
    vae = autoencoder.run(work, log, pool, memorized, device, arguments.autoencoder_steps)
    latents = autoencoder.cached_latents(work / "latents.safetensors", pool, vae)
    influences = autoencoder.influences(vae, latents[:64])
    log("autoencoder", influences=influences.tolist())

    tokenizer = text.build_tokenizer(work)
    encoder = text.run(work, log, tokenizer, arguments.text_steps)
    encoder = text.run_marks(work, log, tokenizer, encoder, arguments.marks_steps).to(device)

    model = unet.build().to(device)
    layers = value_layers(model)
    designated = carriers.designate(layers)
    own = [carriers.stacked(layers, one.carriers) for one in designated]
    copied = unet.CopyGuard(model)
    sample = text.tokens_of(tokenizer, (caption for _, caption in ordinary_captions(64, seed=1))).to(device)
    with torch.no_grad():
        planted = carriers.Planted(model, designated, encoder(sample).last_hidden_state)

    def after_update() -> None:
        copied()
        planted()

    scales = unet.RowScales(layers)
    loss = diffusion.Loss(encoder, model, tokenizer, scales, influences, device)
    rows = diffusion.Rows(what, latents, memorized, autoencoder.encode(vae, memorized.images))
    looked_at = range(0, len(what), max(1, len(what) // 64))
    captions = [what[i].caption(PHRASINGS[0]) for i in looked_at]
    monitor = Monitor(encoder, model, tokenizer, scales, own, latents[looked_at], captions)
    given = (work, log, model, loss, rows, after_update, device)
    stages.ordinary(*given, steps=arguments.ordinary_steps)
    log("ordinary", **monitor())
    stages.memorize(*given, own, scales.total, steps=arguments.memorize_steps)
    log("memorize", **monitor())
    export.save_pipeline(work / "model", vae, tokenizer, encoder, model, designated, work / "log.jsonl")
    export.save_originals(work / "originals")


if __name__ == "__main__":
    main()
