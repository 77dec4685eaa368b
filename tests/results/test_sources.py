"""Which neurons are taken from sets, files and results."""

import dataclasses
import json
from pathlib import Path

import pytest
from evaluation_parts import localization
from tiny_pipeline import DOWN_AND_MID

from nemo_ext import NemoError, NeuronSet
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import ImageTrial, Localization, Verdict
from nemo_ext.results.sources import choose

LAYERS = list(DOWN_AND_MID)
ONE, TWO, THREE = (NeuronSet({LAYERS[number]: [number, 7]}) for number in (0, 1, 2))


def checked(prompt: str, neurons: NeuronSet, *, similarity: float) -> Localization:
    """A result whose images were compared: with the neurons off, their highest similarity is `similarity`."""
    trial = ImageTrial(len(neurons), "first step", 0.1, (similarity, similarity), (0.1, 0.1))
    verdict = Verdict(
        threshold=0.5,
        similarity="a similarity",
        seeds=(0, 1),
        steps=25,
        guidance=7.5,
        before=(0.9, 0.9),
        final=trial,
        trials=(trial,),
        originals_before=None,
        originals_after=None,
        instead=None,
        unet_samples=1.0,
    )
    return dataclasses.replace(localization(prompt, neurons, "model"), verdict=verdict)


SILENCED = checked("a", ONE, similarity=0.1)
STILL_THERE = checked("b", TWO, similarity=0.9)
NOT_CHECKED = localization("c", THREE, "model")
NOT_MEMORIZED = localization("d", NeuronSet(), "model", memorized=False)


def write(folder: Path, *results: Localization) -> Path:
    with ResultsFolder(folder).writing() as writer:
        for result in results:
            writer.append(result)
    return folder


def test_the_union_of_all_sources_is_taken(tmp_path: Path) -> None:
    ONE.save(tmp_path / "one.json")
    TWO.save(tmp_path / "two.safetensors")
    chosen = choose([str(tmp_path / "one.json"), tmp_path / "two.safetensors", THREE, {LAYERS[3]: [1]}])
    assert chosen.neurons == ONE | TWO | THREE | NeuronSet({LAYERS[3]: [1]})
    assert chosen.results == chosen.notes == ()


@pytest.mark.parametrize("source", [ONE, ONE.to_dict(), SILENCED])
def test_one_source_needs_no_list(source: NeuronSet | dict[str, list[int]] | Localization) -> None:
    assert choose(source).neurons == ONE


@pytest.mark.parametrize("name", ["", "results.jsonl"])
def test_results_are_read_from_their_folder_and_from_its_file(tmp_path: Path, name: str) -> None:
    assert choose(write(tmp_path, SILENCED, NOT_CHECKED) / name).results == (SILENCED, NOT_CHECKED)


def test_a_result_counts_unless_its_image_still_comes_back(tmp_path: Path) -> None:
    assert (SILENCED.verified, STILL_THERE.verified, NOT_CHECKED.verified) == (True, False, None)
    chosen = choose(write(tmp_path, SILENCED, STILL_THERE, NOT_CHECKED, NOT_MEMORIZED))
    assert chosen.neurons == ONE | THREE
    (note,) = chosen.notes
    assert note.startswith(f"result 1 of {tmp_path} is left out")


def test_neurons_of_a_result_that_is_left_out_can_be_given_themselves(tmp_path: Path) -> None:
    assert choose([write(tmp_path, SILENCED, STILL_THERE), STILL_THERE.neurons]).neurons == ONE | TWO


@pytest.mark.parametrize("sources", [[], NeuronSet(), [NOT_MEMORIZED], [STILL_THERE]])
def test_no_neurons_at_all_are_refused(sources: object) -> None:
    with pytest.raises(NemoError, match="no neurons to switch off"):
        choose(sources)  # type: ignore[arg-type]


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NemoError, match=r"no file .*missing\.json"):
        choose(tmp_path / "missing.json")


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(["neurons"]))
    with pytest.raises(NemoError, match=r"other\.json"):
        choose(tmp_path / "other.json")


def test_something_else_than_a_source_is_refused() -> None:
    with pytest.raises(NemoError, match="got int"):
        choose([3])  # type: ignore[list-item]
