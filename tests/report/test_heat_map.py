"""The map of neurons and prompts, and the counts of each layer."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace

from nemo_ext.neurons import NeuronSet
from nemo_ext.report.heat_map import MAX_NEURONS, MAX_PROMPTS, layer_counts, neuron_map
from nemo_ext.results.record import Localization

DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def words(uri: str) -> list[str]:
    """The text of an SVG, in order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", base64.b64decode(uri.partition(",")[2]).decode())


def test_rows_are_prompts_and_columns_are_neurons_by_layer_in_network_order(
    localization: Callable[..., Localization],
) -> None:
    results = [
        localization(neurons=NeuronSet({MID: [12], DOWN: [300, 7]})),
        localization(memorized=False),
        localization(neurons=NeuronSet({MID: [12]})),
    ]
    shown = neuron_map(results)
    assert shown is not None
    assert (shown.prompts, shown.all_prompts, shown.neurons, shown.all_neurons, shown.shared) == (2, 2, 3, 3, 1)
    assert words(shown.plot.light) == ["7", "300", "12", "neuron", "1", "3", "prompt", "down 1.0", "mid"]


def test_a_large_map_is_cut_to_the_neurons_that_most_prompts_share(
    localization: Callable[..., Localization],
) -> None:
    common = NeuronSet({MID: [900]})
    found = localization()
    results = [replace(found, neurons=common | NeuronSet({DOWN: [i, i + 1]})) for i in range(0, 400, 2)]
    shown = neuron_map(results)
    assert shown is not None
    assert (shown.prompts, shown.all_prompts) == (MAX_PROMPTS, 200)
    assert (shown.neurons, shown.all_neurons, shown.shared) == (MAX_NEURONS, 401, 1)
    assert "mid" in words(shown.plot.light)
    assert len(shown.plot.light) < 100_000


def test_one_prompt_has_no_map_because_there_is_nothing_to_compare(
    localization: Callable[..., Localization],
) -> None:
    assert neuron_map([localization(), localization(memorized=False)]) is None


def test_a_layer_counts_different_neurons_and_prompts(localization: Callable[..., Localization]) -> None:
    results = [
        localization(neurons=NeuronSet({MID: [1, 2], DOWN: [5]})),
        localization(neurons=NeuronSet({MID: [2, 3]})),
    ]
    counted = [(row.layer, row.neurons, row.prompts) for row in layer_counts(results)]
    assert counted == [(DOWN, 1, 1), (MID, 3, 2)]
