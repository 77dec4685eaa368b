"""The certificate: whether a set of neurons is enough, and each neuron of it needed (docs/method.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Certificate, NeuronScore
from nemo_ext.search.outcome import just_below
from nemo_ext.search.probe import Probe


def certify(
    neurons: NeuronSet, probe: Probe, threshold: float, *, on_trial: Callable[[], None] | None = None
) -> Certificate:
    """Measure the remaining memorization with a set off, and with each neuron of it on again.

    docs/method.md, section 10, defines the certificate.

    Args:
        neurons: the set. An empty set is minimal, and its score is 1.
        probe: measures the remaining memorization. It is asked once for the set and once for each neuron.
        threshold: τ.
        on_trial: a function that is called after every neuron.

    Returns:
        The certificate. Scores of τ or more with a neuron on again can be lower bounds, see `NeuronScore`.
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
