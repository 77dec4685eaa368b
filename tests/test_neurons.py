"""NeuronSet: what it holds, its algebra, and its files."""

import json
from pathlib import Path

import pytest
from tiny_pipeline import DOWN_AND_MID, tiny_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet

FIRST, SECOND, *_, MID = DOWN_AND_MID


class TestContents:
    def test_indices_are_sorted_and_unique(self) -> None:
        assert NeuronSet({MID: [5, 1, 5]})[MID] == (1, 5)

    def test_layers_without_neurons_are_left_out(self) -> None:
        neurons = NeuronSet({MID: [], FIRST: [0]})
        assert neurons.layers == (FIRST,)
        assert MID not in neurons

    def test_length_counts_neurons(self) -> None:
        assert len(NeuronSet({MID: [1, 2], FIRST: [0]})) == 3
        assert not NeuronSet()

    def test_layers_come_in_network_order(self) -> None:
        tenth = "down_blocks.1.attentions.0.transformer_blocks.10.attn2.to_v"
        ninth = tenth.replace("10", "9")
        up = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
        shuffled = NeuronSet({up: [0], tenth: [0], MID: [0], ninth: [0], FIRST: [0]})
        assert list(shuffled) == [FIRST, ninth, tenth, MID, up]

    def test_pairs_lists_every_neuron(self) -> None:
        assert NeuronSet({MID: [4, 2], FIRST: [7]}).pairs() == ((FIRST, 7), (MID, 2), (MID, 4))

    def test_equal_sets_are_equal_and_hash_alike(self) -> None:
        one, other = NeuronSet({MID: [1], FIRST: [2]}), NeuronSet({FIRST: (2,), MID: (1, 1)})
        assert one == other
        assert hash(one) == hash(other)
        assert one != NeuronSet({MID: [1]})
        assert one != {MID: (1,), FIRST: (2,)}

    def test_repr_can_be_evaluated(self) -> None:
        neurons = NeuronSet({MID: [1, 3]})
        assert eval(repr(neurons)) == neurons

    @pytest.mark.parametrize("index", [-1, 1.0, True, "1"])
    def test_refuses_what_is_no_index(self, index: object) -> None:
        with pytest.raises(NemoError, match=f"{MID}: a neuron index must be a whole number of 0 or more"):
            NeuronSet({MID: [index]})

    def test_refuses_what_is_no_layer_name(self) -> None:
        with pytest.raises(NemoError, match="a layer name must be text, got 3"):
            NeuronSet({3: [1]})


def test_algebra_is_that_of_sets() -> None:
    one, other = NeuronSet({FIRST: [0, 1], MID: [5]}), NeuronSet({FIRST: [1, 2], SECOND: [9]})
    assert one | other == NeuronSet({FIRST: [0, 1, 2], SECOND: [9], MID: [5]})
    assert one & other == NeuronSet({FIRST: [1]})
    assert one - other == NeuronSet({FIRST: [0], MID: [5]})


class TestCheck:
    def test_accepts_every_neuron_of_the_model(self) -> None:
        NeuronSet({layer: range(width) for layer, width in DOWN_AND_MID.items()}).check(tiny_pipeline())

    def test_names_an_unknown_layer(self) -> None:
        with pytest.raises(NemoError, match=rf"no value layer '{MID}.weight'; did you mean '{MID}'"):
            NeuronSet({f"{MID}.weight": [0]}).check(tiny_pipeline())

    def test_names_the_layer_that_has_fewer_neurons(self) -> None:
        with pytest.raises(NemoError, match=f"{MID} has neurons 0 to 31, got 32"):
            NeuronSet({MID: [0, 32]}).check(tiny_pipeline())


class TestFiles:
    @pytest.mark.parametrize("ending", [".json", ".safetensors"])
    @pytest.mark.parametrize("neurons", [NeuronSet(), NeuronSet({MID: [31, 0], FIRST: [3]})])
    def test_round_trip(self, tmp_path: Path, ending: str, neurons: NeuronSet) -> None:
        path = tmp_path / "new folder" / f"neurons{ending}"
        neurons.save(path)
        assert NeuronSet.load(path) == neurons
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_dictionary_round_trip(self) -> None:
        neurons = NeuronSet({MID: [31, 0]})
        assert neurons.to_dict() == {MID: [0, 31]}
        assert NeuronSet.from_dict(json.loads(json.dumps(neurons.to_dict()))) == neurons

    def test_other_endings_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"a .json or .safetensors file, got '.pt'"):
            NeuronSet().save(tmp_path / "neurons.pt")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", b"[1]"),
            ("a.json", b"{"),
            ("a.json", b'{"a": 1}'),
            ("a.json", b'{"a": [-1]}'),
            ("a.json", b"\xff"),
            ("a.safetensors", b"x"),
        ],
    )
    def test_other_contents_are_refused_with_the_files_name(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NemoError, match=f"{name} does not hold a set of neurons"):
            NeuronSet.load(tmp_path / name)
