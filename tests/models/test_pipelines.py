"""Other pipelines around Stable Diffusion's U-Net: the whole method works on each of them (docs/pipelines.md)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from tiny_pipeline import DOWN_AND_MID, tiny_pipeline, tiny_xl_pipeline

import nemo_ext
from nemo_ext.cli import main
from nemo_ext.models.loading import load_pipeline
from nemo_ext.search.verification import Verification

*_, MID = DOWN_AND_MID
SOME = {MID: [0, 5, 30]}
PROMPTS = ("a cat", "two dogs", "three red boats", "four owls")
SEEDS = 2
SAMPLING = nemo_ext.Sampling(seeds=2, steps=1, guidance=2.0)


def _of(pipe: StableDiffusionPipeline, kind: type[DiffusionPipeline], **more: object) -> DiffusionPipeline:
    made = kind(**{**pipe.components, "safety_checker": None, "feature_extractor": None, **more},
                requires_safety_checker=False)  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def _models(pipe: StableDiffusionXLPipeline) -> dict[str, object]:
    more = {"image_encoder", "feature_extractor"}
    return {**{name: part for name, part in pipe.components.items() if name not in more}, "add_watermarker": False}


def _xl_controlnet(pipe: StableDiffusionXLPipeline) -> DiffusionPipeline:
    return StableDiffusionXLControlNetPipeline(**_models(pipe), controlnet=ControlNetModel.from_unet(pipe.unet))


def _predicting_v(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def _controlnet() -> DiffusionPipeline:
    pipe = tiny_pipeline()
    return _of(pipe, StableDiffusionControlNetPipeline, controlnet=ControlNetModel.from_unet(pipe.unet))


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "text to image": tiny_pipeline,
    "v-prediction": lambda: _predicting_v(tiny_pipeline()),
    "image to image": lambda: _of(tiny_pipeline(), StableDiffusionImg2ImgPipeline),
    "ControlNet": _controlnet,
    "inpainting": lambda: _of(tiny_pipeline(in_channels=9), StableDiffusionInpaintPipeline),
    "inpainting with a U-Net for text": lambda: _of(tiny_pipeline(), StableDiffusionInpaintPipeline),
    "SDXL": tiny_xl_pipeline,
    "SDXL, image to image": lambda: StableDiffusionXLImg2ImgPipeline(**_models(tiny_xl_pipeline())),
    "SDXL, ControlNet": lambda: _xl_controlnet(tiny_xl_pipeline()),
    "SDXL, inpainting": lambda: StableDiffusionXLInpaintPipeline(**_models(tiny_xl_pipeline(in_channels=9))),
}
#: Those that measure the U-Net of `tiny_pipeline()` with its text alone.
SAME_UNET = [name for name in PIPELINES if "XL" not in name and name not in ("inpainting", "v-prediction")]


#: One pipeline for each kind of U-Net; the others measure in the same way.
KINDS = ("text to image", "inpainting", "SDXL", "SDXL, inpainting")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in PIPELINES),
        *(
            pytest.param(name, half, marks=pytest.mark.slow)
            for name in KINDS
            for half in (torch.bfloat16, torch.float16)
        ),
    ],
)
def test_the_whole_method_runs_in_every_precision(name: str, dtype: torch.dtype) -> None:
    pipe = PIPELINES[name]()
    pipe.to(dtype)
    statistics = nemo_ext.collect_statistics(pipe, PROMPTS, layers=[MID])
    threshold = nemo_ext.memorization_threshold(pipe, PROMPTS[:2], seeds=SEEDS, sampling=SAMPLING, image_prompts=2)
    threshold = replace(threshold, value=0.01)  # below every score, so that there is something to search
    found = nemo_ext.Localizer(
        pipe, statistics=statistics, threshold=threshold, seeds=SEEDS, verify=Verification(budget=0)
    ).localize(PROMPTS[3])
    assert found.score_before == nemo_ext.memorization_score(pipe, PROMPTS[3], seeds=SEEDS).max
    assert found.memorized
    assert found.verified is not None
    untouched = nemo_ext.memorization_score(pipe, PROMPTS[0], seeds=SEEDS).max
    with nemo_ext.patched(pipe, SOME):
        assert nemo_ext.memorization_score(pipe, PROMPTS[0], seeds=SEEDS).max != untouched
    assert nemo_ext.memorization_score(pipe, PROMPTS[0], seeds=SEEDS).max == untouched


@pytest.mark.parametrize("name", SAME_UNET)
def test_the_same_unet_with_text_alone_gives_the_same_figures(name: str) -> None:
    pipe, plain = PIPELINES[name](), tiny_pipeline()
    for images in (False, True):
        ours, theirs = (
            nemo_ext.memorization_score(one, "a cat", seeds=SEEDS, images=images, sampling=SAMPLING).pairs
            for one in (pipe, plain)
        )
        assert torch.equal(ours, theirs)


def test_inpainting_is_measured_as_its_pipeline_draws_with_everything_masked() -> None:
    """The U-Net's first call gets the same mask and nearly the same gray image in the pipeline and in a measurement."""
    pipe = PIPELINES["inpainting"]()
    inputs: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    picture, mask = Image.new("RGB", (32, 32), "gray"), Image.new("L", (32, 32), 255)
    pipe("a cat", image=picture, mask_image=mask, height=32, width=32, num_inference_steps=50, guidance_scale=1.0,
         generator=torch.Generator().manual_seed(1), callback_on_step_end=_stop_at_once)  # fmt: skip
    theirs = inputs[0]
    inputs.clear()
    nemo_ext.memorization_score(pipe, "a cat", seeds=2, batch_size=2)
    ours = inputs[-1][:1]
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert torch.equal(ours[:, 4], theirs[:, 4])
    # The pipeline draws a sample of the autoencoder's distribution, we take its mode.
    torch.testing.assert_close(ours[:, 5:], theirs[:, 5:], atol=1.0, rtol=0)


def test_a_search_on_an_inpainting_model_encodes_the_gray_image_once_for_all_of_its_trials() -> None:
    pipe = PIPELINES["inpainting"]()
    statistics = nemo_ext.collect_statistics(pipe, PROMPTS, layers=[MID])
    calls = {"encodings": 0, "U-Net": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    pipe.vae.encoder.register_forward_hook(count("encodings"))
    pipe.unet.register_forward_hook(count("U-Net"))
    localizer = nemo_ext.Localizer(pipe, statistics=statistics, threshold=0.01, seeds=SEEDS, verify=None)
    localizer.localize(PROMPTS[3])
    # Two calls of the U-Net are observed, for its memory and for where it can be entered; then come the trials.
    assert calls["encodings"] <= 3 < calls["U-Net"]


def _stop_at_once(pipe: DiffusionPipeline, step: int, timestep: int, values: dict[str, object]) -> dict[str, object]:
    pipe._interrupt = True
    return values


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_one_goes_the_whole_way_on_the_command_line(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    statistics, results = str(tmp_path / "statistics.safetensors"), tmp_path / "results"
    assert main(["stats", *model, *prompts, "--out", statistics]) == 0
    search = ["--statistics", statistics, "--threshold", "0.01", "--seeds", "2", "--no-verify"]
    assert main(["localize", *model, "--prompt", PROMPTS[0], *search, "--out", str(results)]) == 0
    nemo_ext.NeuronSet(SOME).save(tmp_path / "neurons.json")
    baked = tmp_path / "baked"
    assert main(["bake", *model[:2], "--neurons", str(tmp_path / "neurons.json"), "--out", str(baked)]) == 0
    with nemo_ext.patched(pipe, SOME):
        wanted = nemo_ext.memorization_score(pipe, PROMPTS[0], seeds=SEEDS).pairs
    got = nemo_ext.memorization_score(load_pipeline(baked), PROMPTS[0], seeds=SEEDS).pairs
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
