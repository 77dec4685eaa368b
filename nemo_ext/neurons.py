"""Sets of neurons: which neurons of which value layers."""

import json
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.models.layers import unknown_layer, value_layers
from nemo_ext.reading import parse_json, read_tensors, refusing

#: A neuron: layer name and index.
Neuron = tuple[str, int]

# No layer of a model has as many neurons. A larger index is a damaged number.
_MOST_NEURONS = 2**31


def _network_order(layer: str) -> list[tuple[int, int, str]]:
    # Digits are compared as numbers, so "transformer_blocks.10" comes after "transformer_blocks.9". For a U-Net the
    # result is the order of the network, because "down" < "mid" < "up" is alphabetical.
    parts = re.split(r"(\d+)", layer)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


class NeuronSet(Mapping[str, tuple[int, ...]]):
    """An immutable set of neurons, which can be read as a mapping: layer name -> sorted neuron indices.

    A neuron is one row of a value layer's weight (docs/method.md). Layers are sorted by name, with the digits in a name
    compared as numbers; for a U-Net this is the order of the network: down, mid, up. Layers without neurons are
    omitted.

    `len(neurons)` is the number of *neurons*; the number of layers is `len(neurons.layers)`. `|`, `&` and `-` are the
    set operations.

    Args:
        neurons: layer name -> neuron indices. The layer name is the module's name inside the denoiser, for example
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_v". Indices are from 0 to `out_features` - 1, in any
            order, and duplicates are removed. None: the set is empty.

    Raises:
        NemoError: a layer name is not text, its value is not a collection of indices, or an index is not a whole number
            of 0 or more, or is larger than any layer.
    """

    def __init__(self, neurons: Mapping[str, Sequence[int]] | None = None) -> None:
        checked: dict[str, tuple[int, ...]] = {}
        for layer, indices in ({} if neurons is None else neurons).items():
            if not isinstance(layer, str):
                raise NemoError(f"a layer name must be text, got {layer!r}")
            if not isinstance(indices, Collection) or isinstance(indices, (str, bytes, Mapping)):
                raise NemoError(f"{layer}: wanted a list of neuron indices, got {type(indices).__name__}")
            for index in indices:
                if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                    raise NemoError(
                        f"{layer}: a neuron index must be a whole number of 0 or more, got {reprlib.repr(index)}"
                    )
                if index >= _MOST_NEURONS:
                    raise NemoError(f"{layer}: no layer has a neuron {reprlib.repr(index)}")
            if len(indices) > 0:
                checked[layer] = tuple(sorted(set(indices)))
        self._neurons = {layer: checked[layer] for layer in sorted(checked, key=_network_order)}

    def __getitem__(self, layer: str) -> tuple[int, ...]:
        return self._neurons[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._neurons)

    def __len__(self) -> int:
        return sum(len(indices) for indices in self._neurons.values())

    def __contains__(self, layer: object) -> bool:
        return layer in self._neurons

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronSet) and self._neurons == other._neurons

    def __hash__(self) -> int:
        return hash(tuple(self._neurons.items()))

    def __repr__(self) -> str:
        return f"NeuronSet({self.to_dict()})"

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that have at least one neuron, in network order."""
        return tuple(self._neurons)

    def pairs(self) -> tuple[Neuron, ...]:
        """Every neuron as a pair (layer name, index), in network order."""
        return tuple((layer, i) for layer, indices in self._neurons.items() for i in indices)

    @classmethod
    def from_pairs(cls, neurons: Iterable[Neuron]) -> "NeuronSet":
        """Make a set from neurons, each of them a pair (layer name, index)."""
        layers: dict[str, list[int]] = {}
        for layer, index in neurons:
            layers.setdefault(layer, []).append(index)
        return cls(layers)

    @classmethod
    def union(cls, sets: Iterable["NeuronSet"]) -> "NeuronSet":
        """Return the union of several sets."""
        return cls.from_pairs(pair for one in sets for pair in one.pairs())

    def _combined(self, other: "NeuronSet", keep: Any) -> "NeuronSet":
        layers = dict.fromkeys((*self.layers, *other.layers))
        return NeuronSet({layer: tuple(keep(set(self.get(layer, ())), set(other.get(layer, ())))) for layer in layers})

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, set.union)

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, set.intersection)

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, set.difference)

    def check(self, model: Any) -> None:
        """Check that every neuron of the set exists in a model.

        Args:
            model: a pipeline or its denoiser.

        Raises:
            NemoError: a layer of the set is not a value layer of the model, or an index is too large for its layer.
        """
        self.check_layers(value_layers(model, "all"))

    def check_layers(self, known: Mapping[str, nn.Linear]) -> None:
        """Do what `check` does, with layers that `value_layers` has already found.

        Args:
            known: layer name -> value layer, for all value layers of the model.

        Raises:
            NemoError: as for `check`.
        """
        for layer, indices in self.items():
            if layer not in known:
                raise unknown_layer(layer, known)
            if indices[-1] >= known[layer].out_features:
                raise NemoError(f"{layer} has neurons 0 to {known[layer].out_features - 1}, got {indices[-1]}")

    def to_dict(self) -> dict[str, list[int]]:
        """Return the set as a dictionary for JSON: layer name -> list of indices, in network order."""
        return {layer: list(indices) for layer, indices in self._neurons.items()}

    @classmethod
    def from_dict(cls, neurons: Mapping[str, Sequence[int]]) -> "NeuronSet":
        """Make a set from a dictionary of `to_dict`.

        Raises:
            NemoError: `neurons` is not a mapping, or as for `NeuronSet`.
        """
        if not isinstance(neurons, Mapping):
            raise NemoError(f"neurons must be a mapping of layer name to indices, got {type(neurons).__name__}")
        return cls(neurons)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        """How `nemo_ext.reading.restored` makes a field that is a set of neurons: with `from_dict`."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls.from_dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a file atomically, in the format that the ending of `path` names.

        Args:
            path: a file that ends in .json, or in .safetensors (then each layer is an int64 tensor of indices).

        Raises:
            NemoError: `path` has another ending.
        """
        ending = _ending(path)
        with replacing(path) as temporary:
            if ending == ".json":
                temporary.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
            else:
                tensors = {layer: torch.tensor(indices, device="cpu") for layer, indices in self.items()}
                safetensors.torch.save_file(tensors, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NeuronSet":
        """Read a set that `save` has written.

        Args:
            path: a .json or .safetensors file.

        Raises:
            NemoError: `path` has another ending, cannot be read, or does not contain a set of neurons.
        """
        ending = _ending(path)
        with refusing(path, "does not hold a set of neurons"):
            if ending == ".json":
                return cls.from_dict(parse_json(Path(path).read_bytes()))
            tensors, _ = read_tensors(path)
            for layer, indices in tensors.items():
                if indices.dtype != torch.int64 or indices.ndim != 1:
                    kind = f"{indices.dtype} {list(indices.shape)}".removeprefix("torch.")
                    raise NemoError(f"{layer}: wanted a list of int64, got {kind}")
            return cls({layer: indices.tolist() for layer, indices in tensors.items()})


def _ending(path: str | os.PathLike[str]) -> str:
    ending = Path(path).suffix
    if ending not in (".json", ".safetensors"):
        raise NemoError(f"{path}: a set of neurons is a .json or .safetensors file, got '{ending}'")
    return ending
