"""The protocols: what the published code does differently, and which choices are refused."""

import dataclasses
import json

import pytest

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol

PAPER = Protocol.paper()
PUBLISHED = Protocol.published_code()


class TestProtocol:
    def test_what_the_published_code_does_differently(self) -> None:
        paper, published = PAPER.to_dict(), PUBLISHED.to_dict()
        assert {name: (paper[name], published[name]) for name in paper if paper[name] != published[name]} == {
            "name": ("paper", "published-code"),
            "step_index": (0, 1),
            "seeds_share_generator": (False, True),
            "data_range": (1.0, None),
            "threshold_guidance": (0.0, 7.0),
            "tries_last_theta": (True, False),
            "keeps_duplicates": (False, True),
            "measures_floor": (True, False),
            "raise_margin": (0.01, 0.0),
        }

    @pytest.mark.parametrize("protocol", [PAPER, PUBLISHED, dataclasses.replace(PAPER, first_seed=7)])
    def test_round_trip(self, protocol: Protocol) -> None:
        assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol

    def test_by_name(self) -> None:
        assert Protocol.from_name("paper") == PAPER
        assert Protocol.from_name("published-code") == PUBLISHED
        with pytest.raises(NemoError, match="no protocol 'papers': wanted paper or published-code"):
            Protocol.from_name("papers")

    @pytest.mark.parametrize(
        ("field", "value"), [("step_index", 50), ("step_index", -1), ("data_range", 0), ("window_sigma", 0)]
    )
    def test_refuses_what_makes_no_sense(self, field: str, value: float) -> None:
        with pytest.raises(NemoError, match=f"{field} must be .* got {value}"):
            dataclasses.replace(PAPER, **{field: value})

    def test_refuses_unknown_fields(self) -> None:
        with pytest.raises(NemoError, match="there is no field speed"):
            Protocol.from_dict({"speed": 1})
