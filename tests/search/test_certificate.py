"""The certificate: what it says of a set of neurons, measured anew."""

import json

import pytest
from fake_probe import LAYERS, FakeProbe, additive

from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Certificate, NeuronScore
from nemo_ext.search.certificate import certify
from nemo_ext.search.exhaustive import refine_exhaustive

DOWN, _, MID, _ = LAYERS


class TestCertificate:
    def test_says_what_each_neuron_does(self) -> None:
        probe = FakeProbe(additive({(DOWN, 1): 0.4, (MID, 2): 0.35}))
        assert certify(NeuronSet({MID: [2], DOWN: [1]}), probe, 0.5) == Certificate(
            threshold=0.5,
            score=pytest.approx(0.25),
            each_on=(NeuronScore(DOWN, 1, pytest.approx(0.65)), NeuronScore(MID, 2, pytest.approx(0.6))),
            below_threshold=True,
            minimal=True,
        )

    def test_tells_that_an_exhaustive_result_is_not_minimal(self) -> None:
        """With 3 and 4 off neuron 2 was needed; then 3 was switched on, and now it is not."""
        scores = {(2, 3, 4): 0.1, (3, 4): 0.9, (2, 4): 0.3, (2,): 0.9, (4,): 0.2, (): 1.0}
        probe = FakeProbe(lambda neurons: scores[neurons.get(MID, ())])
        refinement = refine_exhaustive({MID: [2, 3, 4]}, probe, 0.5)
        assert refinement.neurons == NeuronSet({MID: [2, 4]})
        certificate = certify(refinement.neurons, probe, 0.5)
        assert certificate.each_on == (NeuronScore(MID, 2, 0.2), NeuronScore(MID, 4, 0.9))
        assert certificate.below_threshold
        assert not certificate.minimal

    def test_of_a_set_that_is_not_enough_says_so(self) -> None:
        certificate = certify(NeuronSet({MID: [2]}), FakeProbe(lambda neurons: 0.9), 0.5)
        assert not certificate.below_threshold
        assert certificate.minimal

    def test_of_no_neurons_is_minimal_and_above_the_threshold(self) -> None:
        certificate = certify(NeuronSet(), FakeProbe(lambda neurons: 1.0), 0.5)
        assert (certificate.score, certificate.each_on) == (1.0, ())
        assert certificate.minimal
        assert not certificate.below_threshold

    def test_round_trip(self) -> None:
        certificate = certify(NeuronSet({MID: [2, 3]}), FakeProbe(lambda neurons: len(neurons) / 10), 0.5)
        assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
