"""The files of a saved pipeline: which of them hold the denoiser's weights, and which bytes of these are the neurons.

In a safetensors file a tensor is stored row by row, so a neuron is a span of bytes, and it is off when they are zero.
Nothing else in the file changes: other tensors, their order and the metadata stay byte for byte. The format (8 bytes
with the length of a JSON header, the header, the data) is described at
https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet
from nemo_ext.reading import parse_json, refusing

#: Formats of weights that are not changed here. Some of them are pickles, and opening these can run code.
_OTHER_WEIGHTS = (
    *(".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"),
    *(".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf", ".flashpack"),
)
#: Folders of git and of downloads. They can hold copies of the weights in which the neurons are on.
_LEFT_OUT = (".git", ".cache")
#: How the names of tensors begin in a checkpoint of the original Stable Diffusion code.
_ORIGINAL_LAYOUT = "model.diffusion_model."
#: The part of a file's name that tells the shards of one variant apart.
_SHARD = re.compile(r"-\d{5}-of-\d{5}")

#: Where a neuron lies in a file: the offset of its first byte, and the number of its bytes.
Span = tuple[int, int]


@dataclass(frozen=True)
class FolderPlan:
    """How each file of a saved pipeline gets into its copy.

    Attributes:
        files: all files that are copied, relative to the folder, sorted.
        folders: all folders that are copied, relative to the folder, each of them after its parent.
        spans: for each file that holds neurons, the bytes that become zero.
        left_out: the folders that are not copied.
    """

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    spans: Mapping[Path, Sequence[Span]]
    left_out: tuple[Path, ...]


def plan_folder(folder: Path, denoiser: str, layers: Mapping[str, nn.Linear], neurons: NeuronSet) -> FolderPlan:
    """Find the bytes of the neurons in every copy of the denoiser's weights in a folder. Nothing is written.

    Every variant (such as `*.fp16.safetensors`) and all shards are included. Weights that would keep the neurons on in
    the copy are refused, wherever they are: the folders of the pipeline's other components alone are not searched.

    Args:
        folder: a saved pipeline.
        denoiser: the name of the component whose folder has the denoiser.
        layers: layer name -> value layer, at least for all layers of `neurons`.
        neurons: the neurons, which exist in `layers`.

    Raises:
        NemoError: weights are in a format that is not supported, a file lacks a layer or has another shape of it, a
            weight is not finite, or a file outside the denoiser's folder holds a copy of the weights. The message names
            the file.
    """
    files, folders, left_out = _walk(folder)
    with refusing(folder / "model_index.json", "does not describe a pipeline"):
        index = parse_json((folder / "model_index.json").read_bytes())
    components = {name for name, entry in index.items() if isinstance(entry, list)}
    variants: dict[str, list[Path]] = {}
    for file in files:
        top = file.parts[0]
        if len(file.parts) > 1 and top in components and top != denoiser:
            continue
        if file.suffix.lower() in _OTHER_WEIGHTS:
            raise NemoError(
                f"{folder / file} can hold weights in which the neurons stay on, and only safetensors are changed "
                "because opening a pickle can run code: convert it to safetensors, or move it out of the folder"
            )
        if file.suffix == ".safetensors":
            if file.parent == Path(denoiser):
                variants.setdefault(_SHARD.sub("", file.name), []).append(file)
            else:
                _check_is_no_copy(folder / file, neurons)
    spans: dict[Path, list[Span]] = {}
    for variant, shards in variants.items():
        missing = set(neurons.layers)
        for file in shards:
            found, there = _spans_in(folder / file, layers, neurons)
            missing -= there
            if found:
                spans[file] = found
        if missing:
            raise NemoError(
                f"{folder / denoiser / variant} has no {min(missing)}.weight, so its neurons can't be switched off: "
                "get an undamaged copy, or move the file out of the folder"
            )
    return FolderPlan(files, folders, spans, left_out)


def zero_spans(file: Path, spans: Sequence[Span]) -> None:
    """Overwrite spans of bytes of a file with zeros, which is 0.0 in every floating-point format."""
    with file.open("r+b") as opened:
        for offset, length in spans:
            opened.seek(offset)
            opened.write(bytes(length))


def _walk(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """All files, all folders and the folders that are left out, relative to `folder`. Links are followed."""
    files: list[Path] = []
    folders: list[Path] = []
    left_out: list[Path] = []
    for place, inner, names in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(place).relative_to(folder)
        left_out += [here / name for name in inner if name in _LEFT_OUT]
        inner[:] = sorted(name for name in inner if name not in _LEFT_OUT)
        for name in inner:
            if (Path(place) / name).resolve() in (Path(place).resolve(), *Path(place).resolve().parents):
                raise NemoError(f"{folder / here / name} is a link to a folder that it lies in: remove it")
        folders += [here / name for name in inner]
        files += [here / name for name in names]
    return tuple(sorted(files)), tuple(folders), tuple(left_out)


def _raise(error: OSError) -> None:
    raise error


def _check_is_no_copy(file: Path, neurons: NeuronSet) -> None:
    """Refuse a file outside the denoiser's folder that holds the denoiser's weights, in either layout."""
    wanted = tuple(f"{layer}.weight" for layer in neurons.layers)
    with _opened(file) as weights:
        copies = [name for name in weights.keys() if name.startswith(_ORIGINAL_LAYOUT) or name.endswith(wanted)]  # noqa: SIM118
    if copies:
        raise NemoError(
            f"{file} holds another copy of the weights ({copies[0]}), in which the neurons would stay on: move it out "
            "of the folder"
        )


def _spans_in(file: Path, layers: Mapping[str, nn.Linear], neurons: NeuronSet) -> tuple[list[Span], set[str]]:
    """The spans of all neurons in one file, and the layers whose weight is in it."""
    spans: list[Span] = []
    there: set[str] = set()
    with _opened(file) as weights:
        header, begin = _header(file)
        names = set(weights.keys())
        for layer, indices in neurons.items():
            for part, shape in (("weight", tuple(layers[layer].weight.shape)), ("bias", (layers[layer].out_features,))):
                name = f"{layer}.{part}"
                if name not in names:
                    continue
                _check_values(file, name, weights.get_tensor(name), shape)
                spans += _rows(header[name], begin, indices)
                if part == "weight":
                    there.add(layer)
    return spans, there


def _check_values(file: Path, name: str, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise NemoError(
            f"{file}: {name} must have shape {shape} in floating point, got {tuple(values.shape)} in {values.dtype}"
        )
    # Not every operator knows the formats of 8 bits, and the conversion is exact.
    if not bool(values.float().isfinite().all()):
        raise NemoError(f"{file}: {name} holds NaN or infinity: get an undamaged copy")


def _header(file: Path) -> tuple[Mapping[str, Any], int]:
    """The header of a file, and where its data begin. The library has checked it when it opened the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def _rows(entry: Mapping[str, Any], data: int, indices: Sequence[int]) -> Iterator[Span]:
    """The spans of some rows of a tensor.

    Args:
        entry: the tensor's entry in the header of its file.
        data: where the data of the file begin.
        indices: the rows.
    """
    begin, end = entry["data_offsets"]
    row = (end - begin) // entry["shape"][0]
    for index in indices:
        yield data + begin + index * row, row


def _opened(file: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise NemoError(f"{file} can't be read as safetensors: {error}") from error
