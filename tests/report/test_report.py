"""The HTML report and the contact sheet."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.models.registry import short_layer_name
from nemo_ext.neurons import NeuronSet
from nemo_ext.report.images import contact_sheet
from nemo_ext.report.page import PromptImages, find_images, write_report
from nemo_ext.results.folder import prompt_name
from nemo_ext.results.record import Certificate, Localization, NeuronScore

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
NASTY = '<script>alert("x")</script> & "quotes" \' {{ 7 * 7 }} $\\frac{a}'


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def localization(prompt: str = "a prompt", *, memorized: bool = True) -> Localization:
    """A result as a search leaves it: two neurons, both needed; or one that wasn't memorized."""
    neurons = NeuronSet({LAYER: [7], MID: [12]}) if memorized else NeuronSet()
    certificate = Certificate(
        threshold=0.43,
        score=0.25,
        each_on=(NeuronScore(LAYER, 7, 0.75), NeuronScore(MID, 12, 0.625)),
        below_threshold=True,
        minimal=True,
    )
    return Localization(
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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Page]:
    """Write a report and read it back."""

    def write_and_read(*localizations: Localization, **options: object) -> Page:
        path = write_report(tmp_path / "report.html", localizations, **options)  # type: ignore[arg-type]
        return Page(path.read_text(encoding="utf-8"))

    return write_and_read


class TestReport:
    def test_the_summary_counts_prompts_and_different_neurons(self, write: Callable[..., Page]) -> None:
        page = write(localization("one"), localization("two"), localization("no", memorized=False))
        for count in ("3 prompts searched", "2 memorized", "2 different neurons in all"):
            assert count in page.text

    def test_a_prompt_has_its_scores_its_neurons_and_how_it_was_measured(self, write: Callable[..., Page]) -> None:
        text = write(localization()).text
        for shown in (
            "2 neurons off, score 0.875 → 0.250 (τ = 0.430)",
            "down 1.0 1 7",
            "mid 1 12",
            "floor, all searched neurons off 0.125",
            "seeds kept 0, 4",
            "4 neurons, θ = 4.25, k = 3",
            '"window_sigma": 1.5',
        ):
            assert shown in text

    def test_the_certificate_gives_the_score_with_each_neuron_on(self, write: Callable[..., Page]) -> None:
        text = write(localization()).text
        assert "every neuron is needed" in text
        assert f"{LAYER} 7 0.750 {MID} 12 0.625" in text

    def test_a_set_that_is_not_minimal_is_said_to_be_so(self, write: Callable[..., Page]) -> None:
        found = localization()
        assert found.certificate is not None
        found = replace(found, certificate=replace(found.certificate, minimal=False))
        assert "the set is not 1-minimal" in write(found).text

    def test_a_threshold_that_was_not_reached_is_no_success(self, write: Callable[..., Page]) -> None:
        found = replace(localization(), score_after=0.6, threshold_used=0.61, notes=("The floor is 0.600.",))
        text = write(found).text
        assert "0 brought to the threshold" in text
        assert "Not brought to the threshold" in text
        assert "The floor is 0.600." in text
        assert "searched with 0.610" in text

    def test_a_prompt_that_is_not_memorized_has_no_neurons(self, write: Callable[..., Page]) -> None:
        text = write(localization(memorized=False)).text
        assert "Not memorized: its highest score, 0.312, is not above τ = 0.430" in text
        assert "Certificate" not in text

    def test_text_from_users_stays_text(self, write: Callable[..., Page]) -> None:
        page = write(localization(NASTY), title=NASTY)
        assert page.all("script") == []
        assert page.text.count(" ".join(NASTY.split())) == 4  # title, heading, table, section

    def test_it_loads_nothing_and_runs_nothing(self, write: Callable[..., Page]) -> None:
        page = write(localization())
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
        for _, attributes in page.tags:
            for name in ("src", "srcset", "href"):
                assert (attributes.get(name) or "#").startswith(("data:", "#"))

    def test_plots_are_drawings_for_light_and_dark_pages(self, write: Callable[..., Page]) -> None:
        page = write(localization())
        plots = [image["src"] for image in page.all("img")]
        plots += [source["srcset"] for source in page.all("source")]
        assert len(plots) == 2 * 3  # scores, neurons per layer, certificate
        for plot in plots:
            assert plot is not None
            kind, _, content = plot.partition(";base64,")
            assert kind == "data:image/svg+xml"
            ElementTree.fromstring(base64.b64decode(content))

    def test_every_image_says_what_it_shows(self, write: Callable[..., Page]) -> None:
        image = Image.new("RGB", (8, 8))
        page = write(localization(), images={0: PromptImages(image, {1: image, 2: image}, {1: image})})
        alternatives = [image["alt"] for image in page.all("img")]
        assert len(alternatives) == 3 + 4
        assert all(alternatives)
        assert "Prompt 1, seed 2, untouched model" in alternatives

    def test_large_images_are_made_smaller(self, write: Callable[..., Page]) -> None:
        page = write(localization(), images={0: PromptImages(Image.effect_noise((1024, 512), 90))})
        shown = next(i["src"] for i in page.all("img") if "training image" in (i["alt"] or ""))
        assert shown is not None
        with Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))) as small:
            assert small.size == (256, 128)

    def test_equal_results_give_equal_files(self, tmp_path: Path) -> None:
        first, second = (write_report(tmp_path / name, [localization()]).read_bytes() for name in ("a", "b"))
        assert first == second

    def test_a_damaged_image_is_named_and_no_page_is_left(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        with pytest.raises(NemoError, match=re.escape(str(broken))):
            write_report(tmp_path / "r.html", [localization()], images={0: PromptImages(original=broken)})
        assert list(tmp_path.iterdir()) == [broken]

    def test_no_results_make_no_report(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match="nothing to report"):
            write_report(tmp_path / "r.html", [])


class TestImages:
    def test_are_found_by_the_prompts_place_and_hash_in_the_order_of_seeds(self, tmp_path: Path) -> None:
        folder = tmp_path / "images" / prompt_name(1, "b")
        folder.mkdir(parents=True)
        names = ("original", "before-2", "before-10", "after-2", "contact-sheet", "before-x")
        for name in names:
            Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
        found = find_images(tmp_path, [localization("a"), localization("b")])
        assert list(found) == [1]
        assert found[1].original == folder / "original.png"
        assert list(found[1].before) == [2, 10]
        assert list(found[1].after) == [2]

    @pytest.mark.parametrize("prompt", ["../../etc/passwd", "a" * 5000, "", "\x00", "ä/ö"])
    def test_names_of_prompts_are_safe_for_any_text(self, prompt: str) -> None:
        assert re.fullmatch(r"0003-[0-9a-f]{8}", prompt_name(3, prompt))


class TestContactSheet:
    def test_shows_every_image_in_its_place(self) -> None:
        red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        sheet = contact_sheet([("", [red, None]), ("", [None, blue])], size=32)
        colours = {sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(sheet.height)}
        assert colours == {(255, 255, 255), (255, 0, 0), (0, 0, 255)}
        assert sheet.getpixel((sheet.width // 4, sheet.height // 4)) == (255, 0, 0)
        assert sheet.getpixel((sheet.width * 3 // 4, sheet.height * 3 // 4)) == (0, 0, 255)

    def test_names_rows_and_columns(self) -> None:
        image = Image.new("RGB", (8, 8), "red")
        plain = contact_sheet([("", [image])], size=64)
        named = contact_sheet([("a name\nof a row " * 20, [image])], columns=["seed 1"], size=64)
        assert named.width > plain.width
        assert named.height > plain.height


@pytest.mark.parametrize(
    ("layer", "short"),
    [
        (LAYER, "down 1.0"),
        (MID, "mid"),
        ("up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v", "up 3.2"),
        ("down_blocks.1.attentions.0.transformer_blocks.4.attn2.to_v", "down 1.0.4"),
        ("something.else", "something.else"),
    ],
)
def test_layers_have_short_names_in_plots(layer: str, short: str) -> None:
    assert short_layer_name(layer) == short
