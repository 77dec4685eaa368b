"""Results, verdicts and pages for the tests of the report."""

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet
from nemo_ext.report.page import write_report
from nemo_ext.results.record import Certificate, ImageTrial, Localization, NeuronScore, Verdict

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and its text without styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.style = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "style" and not self.style:
            self.style = data
        else:
            self.words += f" {data}"

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Page]:
    """Write a report and read it back."""

    def write_and_read(*localizations: Localization, **options: Any) -> Page:
        path = write_report(tmp_path / "report.html", localizations, **options)
        return Page(path.read_text(encoding="utf-8"))

    return write_and_read


@pytest.fixture
def localization() -> Callable[..., Localization]:
    """Make a result as a search leaves it: two neurons, both needed; or one that was not memorized."""

    def make(prompt: str = "a prompt", *, memorized: bool = True, **changes: Any) -> Localization:
        neurons = NeuronSet({LAYER: [7], MID: [12]}) if memorized else NeuronSet()
        certificate = Certificate(
            threshold=0.43,
            score=0.25,
            each_on=(NeuronScore(LAYER, 7, 0.75), NeuronScore(MID, 12, 0.625)),
            below_threshold=True,
            minimal=True,
        )
        found = Localization(
            prompt=prompt,
            memorized=memorized,
            score_before=0.875 if memorized else 0.3125,
            score_after=0.25 if memorized else None,
            floor=0.125 if memorized else None,
            threshold=0.43,
            threshold_used=0.43 if memorized else None,
            notes=(),
            theta=4.25 if memorized else None,
            top_k=3 if memorized else None,
            initial_neurons=neurons | NeuronSet({MID: [1, 2]}) if memorized else neurons,
            neurons=neurons,
            kept_seeds=(0, 4) if memorized else (),
            unet_samples=120,
            seconds=12.5,
            certificate=certificate if memorized else None,
            search="exhaustive",
            protocol=Protocol.paper(),
            seeds=10,
            layers=(LAYER, MID),
            similarity_scales=3,
            model="",
            statistics="",
        )
        return replace(found, **changes)

    return make


@pytest.fixture
def verdict() -> Callable[..., Verdict]:
    """Make a verdict of seeds 1, 2 and so on with τ_image = 0.5; `after` holds the figures of `remaining`."""

    def make(
        before: tuple[float, ...] = (0.91, 0.92), after: tuple[float, ...] = (0.31, 0.32), **changes: Any
    ) -> Verdict:
        final = ImageTrial(2, "first step", 0.25, remaining=after, diversity=tuple(value / 2 for value in after))
        made = Verdict(
            threshold=0.5,
            similarity="pixels",
            seeds=tuple(range(1, len(before) + 1)),
            steps=10,
            guidance=3.0,
            before=before,
            final=final,
            trials=(final,),
            originals_before=None,
            originals_after=None,
            instead=None,
            unet_samples=80.0,
        )
        return replace(made, **changes)

    return make
