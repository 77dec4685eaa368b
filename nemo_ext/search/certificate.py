"""The certificate: what a set of neurons does, and whether each of them is needed (docs/method.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Certificate, NeuronScore
from nemo_ext.search.outcome import just_below
from nemo_ext.search.probe import Probe


def certify(
    neurons: NeuronSet, probe: Probe, threshold: float, *, on_trial: Callable[[], None] | None = None
) -> Certificate:
    """Measure a set of neurons: with all off, and with each one on again (docs/method.md, section 10).

    Args:
        neurons: the set; an empty one is minimal and, with a score of 1, not below τ.
        probe: tells the remaining memorization; one call for the set and one for each neuron.
        threshold: τ.
        on_trial: called after every neuron.
    """
    score = probe.remaining(neurons)
    each_on = []
    trials = [neurons - NeuronSet.from_pairs([pair]) for pair in neurons.pairs()]
    for number, (layer, index) in enumerate(neurons.pairs()):
        with_it_on = probe.remaining(trials[number], stop_above=just_below(threshold), ahead=trials[number + 1 :])
        each_on.append(NeuronScore(layer, index, with_it_on))
        if on_trial is not None:
            on_trial()
    return Certificate(
        threshold=threshold,
        score=score,
        each_on=tuple(each_on),
        below_threshold=score <= threshold,
        minimal=all(row.score >= threshold for row in each_on),
    )
