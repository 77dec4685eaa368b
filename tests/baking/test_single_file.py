"""A single file has the names of the original Stable Diffusion code: diffusers reads the same weights from it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from saved_pipeline import NEURONS, WEIGHTS, content, save_tiny_pipeline
from tiny_pipeline import DOWN_AND_MID, tiny_pipeline, tiny_xl_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

import nemo_ext
from nemo_ext import NemoError
from nemo_ext.baking.single_file import single_file
from nemo_ext.cli import main
from nemo_ext.models.loading import load_pipeline
from nemo_ext.models.registry import family_of

OF_THE_XL = {"down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_v": [1, 30]}


def parts_of(pipe: object) -> dict[str, dict[str, torch.Tensor]]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name).state_dict() for name in names if hasattr(pipe, name)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("single") / "model")


@pytest.mark.parametrize(
    ("make", "kind", "neurons"),
    [
        (lambda: tiny_pipeline(text_in_up_blocks=True), StableDiffusionPipeline, NEURONS),
        (lambda: tiny_pipeline(in_channels=9), StableDiffusionInpaintPipeline, {list(DOWN_AND_MID)[-1]: [3]}),
        (tiny_xl_pipeline, StableDiffusionXLPipeline, OF_THE_XL),
    ],
    ids=["SD1", "inpainting", "SDXL"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_reads_the_weights_of_the_new_folder_from_it(
    make: object, kind: type, neurons: object, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = make()  # type: ignore[operator]
    pipe.to(dtype).save_pretrained(tmp_path / "model")
    file = tmp_path / "baked.safetensors"
    nemo_ext.bake(tmp_path / "model", neurons, tmp_path / "baked", single_file=file)
    read = kind.from_single_file(str(file), config=str(tmp_path / "model"), local_files_only=True, torch_dtype=dtype)  # type: ignore[attr-defined]
    expected = parts_of(load_pipeline(tmp_path / "baked", dtype=dtype))
    got = parts_of(read)
    assert got.keys() == expected.keys()
    for part, weights in expected.items():
        assert got[part].keys() == weights.keys()
        for name, weight in weights.items():
            assert got[part][name].dtype == dtype
            assert torch.equal(got[part][name], weight), name


def test_names_are_those_of_a_checkpoint_of_stable_diffusion_1() -> None:
    """diffusers knows the kind of a checkpoint by its names. The numbers of tensors are those of the published file."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    pipe = SimpleNamespace(unet=unet, vae=vae, text_encoder=text)
    weights = single_file(pipe, family_of(unet))
    assert infer_diffusers_model_type(weights) == "v1"
    prefixes = [name.split(".")[0] for name in weights]
    assert {prefix: prefixes.count(prefix) for prefix in prefixes} == {
        "model": 686,
        "first_stage_model": 248,
        "cond_stage_model": 196,  # and `position_ids`, which is no weight
    }
    assert {
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.layer_norm1.weight",
    } <= weights.keys()


def test_the_record_is_in_its_metadata(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "baked.safetensors"
    nemo_ext.bake(model, NEURONS, tmp_path / "baked", single_file=file)
    with safetensors.safe_open(file, framework="pt") as opened:
        record = json.loads(opened.metadata()["nemo_ext"])
    assert record == json.loads((tmp_path / "baked" / "nemo_ext.json").read_text())


def test_the_command_writes_and_names_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    NEURONS.save(tmp_path / "neurons.json")
    file = tmp_path / "baked.safetensors"
    options = [
        "--neurons",
        str(tmp_path / "neurons.json"),
        "--out",
        str(tmp_path / "baked"),
        "--single-file",
        str(file),
    ]
    assert main(["bake", "--model", str(model), *options]) == 0
    assert f"Written: {file}" in capsys.readouterr().out
    assert safetensors.torch.load_file(file)


def test_a_prediction_of_v_is_said_because_the_file_cannot_say_it(model: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "model")
    baked = nemo_ext.bake(tmp_path / "model", NEURONS, tmp_path / "out", single_file=tmp_path / "v.safetensors")
    assert any("v.safetensors can't say that this model predicts v" in note for note in baked.notes)


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path: Path) -> object:
        before = content(tmp_path)
        yield
        after = content(tmp_path)
        assert {name for name in after if name not in before and "baked" in name} == set()

    def test_another_format(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"give .*/a\.ckpt a name that ends with \.safetensors"):
            nemo_ext.bake(model, NEURONS, tmp_path / "baked", single_file=tmp_path / "a.ckpt")

    def test_a_file_that_exists(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"mine")
        with pytest.raises(NemoError, match=r"a\.safetensors exists: give a new one, nothing is overwritten"):
            nemo_ext.bake(model, NEURONS, tmp_path / "baked", single_file=tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == b"mine"

    @pytest.mark.parametrize("folder", ["model", "baked"])
    def test_a_place_in_a_folder_of_the_pipeline(self, model: Path, tmp_path: Path, folder: str) -> None:
        place = model if folder == "model" else tmp_path / "baked"
        with pytest.raises(NemoError, match=f"a.safetensors lies in the folder {place}: give another place"):
            nemo_ext.bake(model, NEURONS, tmp_path / "baked", single_file=place / "a.safetensors")

    def test_stable_diffusion_2(self, model: Path, tmp_path: Path) -> None:
        pipe = load_pipeline(model)
        pipe.text_encoder.config.hidden_act = "gelu"
        pipe.save_pretrained(tmp_path / "model")
        with pytest.raises(
            NemoError, match="Stable Diffusion 2 can't be written as a single file: the original layout"
        ):
            nemo_ext.bake(tmp_path / "model", NEURONS, tmp_path / "baked", single_file=tmp_path / "baked.safetensors")

    def test_a_unet_with_different_numbers_of_layers(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.register_to_config(layers_per_block=(2, 1, 2, 2))
        with pytest.raises(NemoError, match=r"layers_per_block=\(2, 1, 2, 2\) can't be written as a single file"):
            single_file(pipe, family_of(pipe))

    def test_weights_that_the_original_does_not_have(self) -> None:
        pipe = tiny_pipeline()
        pipe.unet.adapter = torch.nn.Linear(2, 2)
        with pytest.raises(NemoError, match=r"adapter\.weight has no place in the original layout"):
            single_file(pipe, family_of(pipe))


def test_its_precision_is_that_of_the_variant_that_is_loaded(model: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(model, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "model", variant="bf16")
    assert not list((tmp_path / "model" / "unet").glob(WEIGHTS))
    nemo_ext.bake(tmp_path / "model", NEURONS, tmp_path / "out", single_file=tmp_path / "a.safetensors")
    weights = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
