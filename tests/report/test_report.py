"""The HTML report and the contact sheet."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemo_ext.errors import NemoError
from nemo_ext.models.registry import short_layer_name
from nemo_ext.report.images import contact_sheet
from nemo_ext.report.page import PromptImages, find_images, write_report
from nemo_ext.report.tables import ReportTable
from nemo_ext.results.folder import prompt_name
from nemo_ext.results.record import ImageTrial

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
NASTY = '<script>alert("x")</script> & "quotes" \' {{ 7 * 7 }} $\\frac{a}'

Make = Callable[..., Any]


class TestSummary:
    def test_counts_prompts_and_different_neurons(self, localization: Make, write: Make) -> None:
        page = write(localization("one"), localization("two"), localization("no", memorized=False))
        for count in ("3 prompts searched", "2 memorized", "2 different neurons in all"):
            assert count in page.text

    def test_counts_every_memorized_prompt_once_by_what_its_images_show(
        self, localization: Make, verdict: Make, write: Make
    ) -> None:
        text = write(
            localization("gone", verdict=verdict()),
            localization("gone, but another", verdict=verdict(instead=("x", None))),
            localization("still there", verdict=verdict(after=(0.3, 0.8))),
            localization("not checked"),
            localization("never alike", verdict=verdict(before=(0.2, 0.2))),
            localization("not memorized", memorized=False, verdict=verdict()),
        ).text
        for count in (
            "✓ 2 images gone",
            "✗ 1 still replicating",
            "? 1 with images not checked",
            "? 1 with images that were never alike",
            "✗ 1 with another memorized image instead",
        ):
            assert count in text

    def test_a_row_has_the_verdict_and_the_figures_before_and_after(
        self, localization: Make, verdict: Make, write: Make
    ) -> None:
        text = write(localization(verdict=verdict(after=(0.3, 0.8)))).text
        figures = "0.875 → 0.250 τ 0.430 2 2 → 1 of 2 0.920 → 0.800 τ image 0.500 limit 0.460 120"
        assert f"1 a prompt ✗ still there in 1 of 2 images {figures}" in text

    def test_a_row_of_a_prompt_that_was_not_searched_has_figures_before_alone(
        self, localization: Make, verdict: Make, write: Make
    ) -> None:
        text = write(localization(memorized=False, verdict=verdict(before=(0.2, 0.2)))).text
        assert "– not memorized 0.312 τ 0.430 – – 0.200 τ image 0.500 120" in text

    def test_a_row_shows_the_label_of_its_prompt(self, localization: Make, write: Make) -> None:
        text = write(localization(label="VM <b>"), localization("another")).text
        assert "1 a prompt VM <b> ? images not checked" in text
        assert "2 another ? images not checked" in text

    def test_tables_of_others_follow_it(self, localization: Make, write: Make) -> None:
        table = ReportTable("Evaluation", "A <b>caption</b>.", ["measure", "value"], [["SSCD", NASTY]], numbers=[1])
        page = write(localization(), tables=[table])
        expected = f"Evaluation A <b>caption</b>. measure value SSCD {' '.join(NASTY.split())} Neurons by layer"
        assert expected in page.text
        assert [cell.get("class") for cell in page.all("th") if cell.get("scope") == "col"].count("number") > 1

    @pytest.mark.parametrize(("row", "number"), [(["one"], 0), (["one", "two"], 2)])
    def test_a_table_that_does_not_fit_its_columns_is_refused(self, row: list[str], number: int) -> None:
        with pytest.raises(ValueError, match="table 'T'"):
            ReportTable("T", "", ["a", "b"], [row], numbers=[number])


class TestPrompt:
    def test_has_its_scores_its_neurons_and_how_it_was_measured(self, localization: Make, write: Make) -> None:
        text = write(localization()).text
        for shown in (
            "With 2 neurons off, the first step went from 0.875 to 0.250 (τ = 0.430)",
            "down 1.0 1 7",
            "mid 1 12",
            "floor, all searched neurons off 0.125",
            "seeds kept 0, 4",
            "4 neurons, θ = 4.25, k = 3",
            '"window_sigma": 1.5',
        ):
            assert shown in text

    @pytest.mark.parametrize(
        ("after", "colour", "words"),
        [
            ((0.3, 0.3), "good", "1. a prompt ✓ The image no longer comes back: 2 of 2 seeds"),
            ((0.3, 0.8), "bad", "1. a prompt ✗ First step below τ, but 1 of 2 images still replicate"),
            (None, "unknown", "1. a prompt ? Images not checked: the first step is below τ"),
        ],
    )
    def test_begins_with_its_verdict_in_words_a_sign_and_a_colour(
        self, localization: Make, verdict: Make, write: Make, after: Any, colour: str, words: str
    ) -> None:
        page = write(localization(verdict=verdict(after=after) if after else None))
        assert words in page.text
        assert [tag["class"] for tag in page.all("p") if "verdict" in (tag.get("class") or "")] == [f"verdict {colour}"]

    def test_names_the_prompt_whose_image_appears_instead(self, localization: Make, verdict: Make, write: Make) -> None:
        page = write(localization("one", verdict=verdict(instead=("two", "two"))), localization("two"))
        assert "Another memorized image appears instead: 2 of 2 seeds" in page.text
        assert "Seeds 1, 2: the training image of prompt 2 , “two”." in page.text
        assert [link["href"] for link in page.all("a")].count("#prompt-2") == 2  # here and in the table

    def test_says_that_only_its_images_are_memorized(self, localization: Make, verdict: Make, write: Make) -> None:
        found = localization(score_before=0.3, verdict=verdict())
        assert "because the images of different seeds are alike" in write(found).text

    def test_lists_the_sets_whose_images_were_compared(self, localization: Make, verdict: Make, write: Make) -> None:
        made = verdict()
        partial = ImageTrial(9, "images", None, remaining=(0.7,), diversity=())
        text = write(localization(verdict=replace(made, trials=(made.final, partial, made.final)))).text
        assert (
            "first step ✓ differ 2 0.250 0.320 images ✗ replicate, after 1 of 2 images 9 – 0.700 "
            "first step (the result) ✓ differ 2 0.250 0.320"
        ) in text

    def test_shows_the_trials_of_its_search(self, localization: Make, write: Make) -> None:
        page = write(localization(history=((240, 0.1), (120, 0.7), (180, 0.2))))
        assert "2 of 3 are at or below τ" in page.text
        assert any("each of the 3 trials" in (image["alt"] or "") for image in page.all("img"))

    def test_many_trials_do_not_make_the_page_large(self, localization: Make, write: Make, tmp_path: Path) -> None:
        write(localization(history=tuple((trial % 240, trial % 97 / 97) for trial in range(3_000))))
        assert (tmp_path / "report.html").stat().st_size < 1_000_000

    def test_its_certificate_gives_the_score_with_each_neuron_on(self, localization: Make, write: Make) -> None:
        text = write(localization()).text
        assert "every neuron is needed" in text
        assert "down 1.0 7 0.750 mid 12 0.625" in text

    def test_a_set_that_is_not_minimal_is_said_to_be_so(self, localization: Make, write: Make) -> None:
        found = localization()
        found = replace(found, certificate=replace(found.certificate, minimal=False))
        assert "the set is not 1-minimal" in write(found).text

    def test_a_threshold_that_was_not_reached_is_no_success(self, localization: Make, write: Make) -> None:
        text = write(localization(score_after=0.6, threshold_used=0.61, notes=("the floor is 0.600",))).text
        assert "the first step is still above τ" in text
        assert "The floor is 0.600." in text
        assert "searched with 0.610" in text

    def test_has_no_neurons_if_it_is_not_memorized(self, localization: Make, write: Make) -> None:
        text = write(localization(memorized=False)).text
        assert "The score 0.312 is not above τ = 0.430." in text
        assert "Certificate" not in text
        assert "Neurons by layer" not in text


class TestPage:
    def test_text_from_users_stays_text(self, localization: Make, verdict: Make, write: Make) -> None:
        replaced = verdict(instead=(NASTY, None), similarity=NASTY)
        trial = replace(replaced.final, criterion=NASTY)
        found = localization(NASTY, notes=(NASTY,), verdict=replace(replaced, trials=(trial,)))
        page = write(found, title=NASTY)
        assert page.all("script") == []
        # Title, heading, table, section, note, criterion, the image that appears instead; the similarity twice.
        assert page.text.count(" ".join(NASTY.split())) == 9

    def test_it_loads_nothing_and_runs_nothing(self, localization: Make, verdict: Make, write: Make) -> None:
        page = write(localization(verdict=verdict(), history=((2, 0.5), (1, 0.5))), localization())
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
        for _, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "srcset", "href"):
                assert (attributes.get(name) or "#").startswith(("data:", "#"))
        assert "url(" not in page.style
        (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

    def test_plots_are_drawings_for_light_and_dark_pages(self, localization: Make, verdict: Make, write: Make) -> None:
        page = write(localization(verdict=verdict(), history=((2, 0.5), (1, 0.5))), localization(certificate=None))
        plots = [image["src"] for image in page.all("img")]
        plots += [source["srcset"] for source in page.all("source")]
        assert len(plots) == 2 * 6  # scores, map of neurons, frequency, overlap, search, certificate
        for plot in plots:
            assert plot is not None
            kind, _, content = plot.partition(";base64,")
            assert kind == "data:image/svg+xml"
            ElementTree.fromstring(base64.b64decode(content))

    def test_every_image_says_what_it_shows(self, localization: Make, write: Make) -> None:
        image = Image.new("RGB", (8, 8))
        page = write(localization(), images={0: PromptImages(image, {1: image, 2: image}, {1: image})})
        alternatives = [image["alt"] for image in page.all("img")]
        assert len(alternatives) == 2 + 4
        assert all(alternatives)
        assert "Prompt 1, seed 2, untouched model" in alternatives

    def test_every_header_of_a_table_says_what_it_heads(self, localization: Make, verdict: Make, write: Make) -> None:
        page = write(localization(verdict=verdict(), history=((2, 0.5), (1, 0.5))), localization())
        assert {header.get("scope") for header in page.all("th")} == {"row", "col"}

    def test_text_has_enough_contrast_on_light_and_dark_pages(self, localization: Make, write: Make) -> None:
        """A contrast of 4.5 or more, as the Web Content Accessibility Guidelines want it for text of normal size."""
        palettes = [
            dict(re.findall(r"--([a-z-]+): (#\w+)", rule)) for rule in write(localization()).style.split(":root")[1:]
        ]
        assert len(palettes) == 2
        for palette in palettes:
            for ink, ground in (
                *((ink, "ground") for ink in ("ink", "soft", "good", "bad", "unknown", "plain")),
                *((ink, f"{ink}-ground") for ink in ("good", "bad", "unknown", "plain")),
                *(("ink", f"{ground}-ground") for ground in ("good", "bad", "unknown", "plain")),
                ("soft", "panel"),
            ):
                assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)

    def test_large_images_are_made_smaller(self, localization: Make, write: Make) -> None:
        page = write(localization(), images={0: PromptImages(Image.effect_noise((1024, 512), 90))})
        shown = next(i["src"] for i in page.all("img") if "training image" in (i["alt"] or ""))
        assert shown is not None
        with Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))) as small:
            assert small.size == (256, 128)

    def test_equal_results_give_equal_files(self, localization: Make, verdict: Make, tmp_path: Path) -> None:
        results = [localization(verdict=verdict(), history=((9, 0.5),) * 400), localization()]
        first, second = (write_report(tmp_path / name, results).read_bytes() for name in ("a", "b"))
        assert first == second

    def test_a_damaged_image_is_named_and_no_page_is_left(self, localization: Make, tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        with pytest.raises(NemoError, match=re.escape(str(broken))):
            write_report(tmp_path / "r.html", [localization()], images={0: PromptImages(original=broken)})
        assert list(tmp_path.iterdir()) == [broken]

    def test_no_results_make_no_report(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match="nothing to report"):
            write_report(tmp_path / "r.html", [])


def contrast(first: str, second: str) -> float:
    """The contrast of two colours, from 1 to 21."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


class TestImages:
    def test_are_found_by_the_prompts_place_and_hash_in_the_order_of_seeds(
        self, localization: Make, tmp_path: Path
    ) -> None:
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

    def test_writes_a_note_under_each_image(self) -> None:
        image = Image.new("RGB", (8, 8), "red")
        plain = contact_sheet([("", [image, image])], size=64)
        noted = contact_sheet([("", [image, image])], notes=[["", "0.83"]], size=64)
        assert noted.height > plain.height
        below = noted.crop((0, plain.height - 4, noted.width, noted.height)).convert("L")
        left, right = below.crop((0, 0, noted.width // 2, below.height)), below.crop((noted.width // 2, 0, *below.size))
        assert left.getextrema() == (255, 255)
        assert right.getextrema()[0] < 128


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
