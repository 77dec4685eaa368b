"""Every file that the package reads: a damaged one is read, or refused with one sentence that names it."""

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from damage import OF_BYTES, damaged, header_changed, json_changed, line_changed, tensor_changed
from PIL import Image, ImageFile

from nemo_ext.errors import NemoError
from nemo_ext.files import read_image, read_prompts
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.originals import Originals, read_originals
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.measure.threshold import ImageThreshold, Threshold, mean_and_std
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import prompt_name, read_results
from nemo_ext.results.record import Certificate, ImageTrial, Localization, NeuronScore, Verdict
from nemo_ext.results.words import short_verdict, verdict_sentence

DOWN, MID = "down_blocks.0.to_v", "mid_block.to_v"
NEURONS = NeuronSet({DOWN: [0, 3], MID: [7]})


def statistics() -> ActivationStatistics:
    made = ActivationStatistics({DOWN: 4, MID: 8}, fingerprint="ab" * 32, model_name="a model")
    made._count = torch.tensor(5.0, dtype=torch.float64)
    made._mean = torch.linspace(-1, 1, 12, dtype=torch.float64)
    made._m2 = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    made._received = 5
    return made


def threshold() -> Threshold:
    scores, similar = (0.25, 0.375, 0.3125), (0.5, 0.625)
    images = ImageThreshold(
        sum(mean_and_std(similar)), *mean_and_std(similar), similar, Sampling(4, 1, 25, 7.5), "pixels"
    )
    model = {"fingerprint": "ab" * 32, "model_name": "a model"}
    return Threshold(
        sum(mean_and_std(scores)), *mean_and_std(scores), scores, 10, Protocol.paper(), images=images, **model
    )


def localization() -> Localization:
    """A result with everything that a search can leave."""
    trial = ImageTrial(3, "first step", 0.25, remaining=(0.25, 0.125), diversity=(0.0625, 0.0625))
    return Localization(
        prompt="a zebra, ü",
        memorized=True,
        score_before=0.875,
        score_after=0.25,
        floor=0.125,
        threshold=0.43,
        threshold_used=0.43,
        notes=("a note",),
        theta=4.25,
        top_k=3,
        initial_neurons=NEURONS | NeuronSet({MID: [1]}),
        neurons=NEURONS,
        kept_seeds=(0, 4),
        unet_samples=120.5,
        seconds=12.5,
        certificate=Certificate(0.43, 0.25, (NeuronScore(DOWN, 0, 0.75),), True, True, True, 0.25),
        search="grouped",
        protocol=Protocol.published_code(),
        seeds=10,
        layers=(DOWN, MID),
        similarity_scales=3,
        model="ab" * 32,
        statistics="cd" * 32,
        history=((3, 0.25), (2, 0.5)),
        verification={"sampling": Sampling(2, 1, 25, 7.5).to_dict(), "budget": 100, "originals": None},
        verdict=Verdict(
            threshold=0.5,
            similarity="pixels",
            seeds=(1, 2),
            steps=25,
            guidance=7.5,
            before=(0.875, 0.875),
            final=trial,
            trials=(trial,),
            originals_before=(0.75, 0.75),
            originals_after=(0.125, 0.125),
            instead=(None, "a fox"),
            unet_samples=60.0,
        ),
    )


def not_memorized() -> Localization:
    nothing = dict.fromkeys(("score_after", "floor", "threshold_used", "theta", "top_k", "certificate", "verdict"))
    sets = {"initial_neurons": NeuronSet(), "neurons": NeuronSet(), "kept_seeds": (), "history": (), "notes": ()}
    return dataclasses.replace(localization(), prompt="a cat", memorized=False, score_before=0.25, **nothing, **sets)


def write_results(path: Path) -> None:
    path.write_text("".join(json.dumps(found.to_dict()) + "\n" for found in (localization(), not_memorized())))


def write_image(path: Path) -> None:
    pixels = random.Random(0).randbytes(24 * 16 * 3)
    Image.frombytes("RGB", (24, 16), pixels).save(path)


def write_originals(path: Path) -> None:
    write_image(path.with_name("fox.png"))
    path.write_text('prompt,image,label\n"a fox, ü",fox.png,VM\na cat,fox.png,TM\n', encoding="utf-8")


PUBLISHED_LIST = ';Caption;URL;type;Index\n0;"a ""fox""; ü";http://a;VM;3\n1;a cat;http://b;TM;4\n'
PROMPT_LINES = '{"caption": "a fox", "type": "VM"}\n{"caption": "a cat", "type": "TM"}\n'
IMAGES = ("png", "jpg", "gif", "webp", "bmp", "tiff")


def text(content: str) -> Callable[[Path], object]:
    """What writes a text file."""
    return lambda path: path.write_text(content, encoding="utf-8")


def use_originals(originals: Originals) -> None:
    assert all(image.mode == "RGB" for images in originals.values() for image in images)


def use_prompts(prompts: list[str]) -> None:
    assert prompts
    for number, prompt in enumerate(prompts):
        prompt_name(number, prompt)


def use_neurons(neurons: NeuronSet) -> None:
    assert NeuronSet.from_dict(neurons.to_dict()) == neurons
    torch.tensor([index for _, index in neurons.pairs()], dtype=torch.int64)


def use_statistics(read: ActivationStatistics) -> None:
    assert read.count >= 0
    assert len(read.digest()) == 64
    assert sum(map(len, read.mean.values())) == sum(read.widths.values())
    if read.count > 1:
        assert all(bool(values.isfinite().all()) for values in (*read.mean.values(), *read.std.values()))


def use_threshold(read: Threshold) -> None:
    assert math.isfinite(float(read))
    assert read.seeds > 0
    json.dumps(dataclasses.asdict(read), allow_nan=False)


def use_results(results: list[Localization]) -> None:
    for number, found in enumerate(results):
        prompt_name(number, found.prompt)
        assert short_verdict(found)
        assert verdict_sentence(found)
        assert f"{found.score_before:.3f} {found.seconds:.1f} {found.unet_samples:.1f}"
        assert found.unet_samples >= 0
        assert (
            found.settings == Localization.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))).settings
        )


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: its name, how an undamaged one is written, how one is read, what then works, its own damages."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    use: Callable[[Any], object]
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = ()


JSON, LINES = (json_changed,) * 3, (line_changed,) * 3
TENSORS = (header_changed, tensor_changed)
FORMATS = (
    Format("neurons.json", NEURONS.save, NeuronSet.load, use_neurons, JSON),
    Format("neurons.safetensors", NEURONS.save, NeuronSet.load, use_neurons, TENSORS),
    Format("stats.safetensors", statistics().save, ActivationStatistics.load, use_statistics, TENSORS),
    Format("threshold.json", threshold().save, Threshold.load, use_threshold, JSON),
    Format("results.jsonl", write_results, read_results, use_results, LINES),
    Format("prompts.txt", text("a fox, ü\na cat\n"), read_prompts, use_prompts),
    Format("prompts.csv", text(PUBLISHED_LIST), read_prompts, use_prompts),
    Format("prompts.jsonl", text(PROMPT_LINES), read_prompts, use_prompts, LINES),
    Format("originals.csv", write_originals, read_originals, use_originals),
    *(Format(f"image.{ending}", write_image, read_image, Image.Image.load) for ending in IMAGES),
)


def failure(kind: Format, path: Path) -> str | None:
    """What is wrong with reading a file; None if it is read and can be used, or refused with one sentence."""
    try:
        read = kind.read(path)
    except NemoError as error:
        message = str(error)
        if str(path) not in message or "\n" in message or len(message) > 500:
            return f"no sentence: {message}"
        return None
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    try:
        kind.use(read)
    except Exception as error:
        return f"read what cannot be used, {type(error).__name__}: {error}"
    return None


def failures(kind: Format, folder: Path, count: int, seed: int = 0) -> list[str]:
    """The failures among `count` damaged files of a kind."""
    path = folder / kind.name
    kind.write(path)
    assert failure(kind, path) is None
    found = []
    for damage, content in damaged(path.read_bytes(), (*OF_BYTES, *kind.kinds), count, seed):
        path.write_bytes(content)
        if reason := failure(kind, path):
            found.append(f"{damage}: {reason}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_damaged_file_is_read_or_refused_with_one_sentence(kind: Format, tmp_path: Path) -> None:
    assert failures(kind, tmp_path, 200) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_so_is_each_of_many_thousands(kind: Format, tmp_path: Path) -> None:
    assert failures(kind, tmp_path, 2000, seed=1) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", IMAGES)
@pytest.mark.parametrize("lenient", [False, True])
def test_an_image_that_is_cut_off_is_refused(
    ending: str, lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program around us has told Pillow to fill what is missing with gray."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / f"image.{ending}"
    write_image(path)
    content = path.read_bytes()
    for length in range(0, len(content) * 9 // 10, 7):
        path.write_bytes(content[:length])
        with pytest.raises(NemoError, match=f"the image .*image.{ending} can't be read"):
            read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kept_seeds.1", -1, r"kept_seeds\[1\]: wanted greater than or equal to 0, got -1"),
        ("kept_seeds.1", 10, "kept_seeds: wanted seeds from 0 to 9, got 10"),
        ("unet_samples", -0.5, "unet_samples: wanted greater than or equal to 0, got -0.5"),
        ("score_before", float("nan"), "wanted finite numbers, got NaN"),
        ("score_before", "0.9", "score_before: wanted a valid number, got '0.9'"),
        ("score_before", True, "score_before: wanted a valid number, got true"),
        ("score_after", None, "score_after is missing, although the prompt is memorized"),
        ("memorized", 1, "memorized: wanted a valid boolean, got 1"),
        ("certificate", [], "certificate: wanted an object, got a list"),
        ("certificate.each_on.0.index", 0.5, r"certificate.each_on\[0\].index: wanted a valid integer, got 0.5"),
        ("neurons.elsewhere", [1], "neurons: 'elsewhere' is not one of the searched layers"),
        ("neurons", [1], "neurons: neurons must be a mapping of layer name to indices, got list"),
        (f"neurons/{MID}", [2**40], f"neurons: {MID}: no layer has a neuron 1099511627776"),
        (f"neurons/{MID}", "12", f"neurons: {MID}: wanted a list of neuron indices, got str"),
        ("protocol.step_index", 50, "protocol: step_index must be from 0 to num_inference_steps - 1 = 49, got 50"),
        ("protocol.speed", 1, "there is no field protocol.speed"),
        ("verdict.before", [0.5], "verdict.before: wanted a value for each of 2 seeds, got 1"),
        ("verdict.seeds", [], "verdict.seeds: wanted two seeds or more, got 0"),
        ("verdict.threshold", 10**400, "verdict.threshold: wanted a finite number, got 1000"),
    ],
)
def test_a_result_that_means_nothing_is_refused_by_file_line_and_field(
    path: str, value: object, said: str, tmp_path: Path
) -> None:
    values = localization().to_dict()
    *folders, name = path.split("/") if "/" in path else path.split(".")
    container: Any = values
    for folder in folders:
        container = container[int(folder) if folder.isdigit() else folder]
    container[int(name) if name.isdigit() else name] = value
    lines = [json.dumps(not_memorized().to_dict()), json.dumps(values)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(NemoError, match=rf"results\.jsonl, line 2, is not a result: {said}"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"count": torch.tensor(-1.0).double()}, "count: wanted numbers of 0 or more, got -1"),
        ({"count": torch.tensor(1.5).double()}, "count: wanted a whole number of prompts, got 1.5"),
        ({"count": torch.tensor(5)}, r"count: wanted float64 \[\], got int64 \[\]"),
        ({"mean": torch.full((12,), math.nan).double()}, "mean: wanted finite numbers, got NaN or infinity"),
        ({"mean": torch.zeros(11).double()}, r"mean: wanted float64 \[12\], got float64 \[11\]"),
        ({"m2": torch.full((12,), -1.0).double()}, "m2: wanted numbers of 0 or more, got -1"),
        ({"m2": None}, "m2 is missing"),
    ],
)
def test_statistics_that_mean_nothing_are_refused_by_tensor(
    tensors: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "stats.safetensors"
    statistics().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: tensor for name, tensor in {**held, **tensors}.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, metadata)
    with pytest.raises(NemoError, match=rf"stats\.safetensors does not hold activation statistics: {said}"):
        ActivationStatistics.load(path)


@pytest.mark.parametrize("field", ["value", "mean", "std"])
def test_a_threshold_with_a_damaged_digit_is_refused(field: str, tmp_path: Path) -> None:
    dataclasses.replace(threshold(), **{field: 0.9}).save(tmp_path / "t.json")
    with pytest.raises(NemoError, match=rf"t\.json does not hold a threshold: {field}: wanted .* got 0\.9"):
        Threshold.load(tmp_path / "t.json")


def test_a_layer_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'{{"{MID}": [1], "{MID}": [2]}}')
    with pytest.raises(NemoError, match=rf"a\.json does not hold a set of neurons: '{MID}' is there twice"):
        NeuronSet.load(tmp_path / "a.json")


@pytest.mark.parametrize("read", [NeuronSet.load, ActivationStatistics.load, Threshold.load, read_image])
def test_a_file_that_is_not_there_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(NemoError, match=re.escape(str(path))):
            read(path)
