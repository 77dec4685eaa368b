"""The grid of images: which image and which figures stand in the column of a seed."""

from collections.abc import Callable

import pytest
from PIL import Image

from nemo_ext.report.grid import Grid, Mark, image_grid
from nemo_ext.report.page import PromptImages
from nemo_ext.results.record import ImageTrial, Localization, Verdict

IMAGE = Image.new("RGB", (4, 4))


@pytest.fixture
def grid(localization: Callable[..., Localization]) -> Callable[..., Grid]:
    """The grid of prompt 1, which must not be None."""

    def make(images: PromptImages | None = None, **changes: object) -> Grid:
        made = image_grid(localization(**changes), images, number=1, numbers={"a prompt": 1, "another": 5})
        assert made is not None
        return made

    return make


def test_figures_stand_in_the_column_of_their_seed(grid: Callable[..., Grid], verdict: Callable[..., Verdict]) -> None:
    shown = grid(verdict=verdict((0.91, 0.92), (0.31, 0.32), seeds=(3, 7), originals_after=(0.11, 0.12)))
    assert shown.seeds == (3, 7)
    before, after = shown.stages
    assert [row.values for row in before.figures] == [(0.91, 0.92)]
    assert [row.values for row in after.figures] == [(0.31, 0.32), (0.155, 0.16), (0.11, 0.12)]
    assert [row.label for row in after.figures] == [
        "similarity with another seed's image before or the training image",
        "similarity with another seed's image after",
        "similarity with the training image",
    ]


def test_figures_that_the_verdict_depends_on_have_their_limits(
    grid: Callable[..., Grid], verdict: Callable[..., Verdict]
) -> None:
    made = verdict((0.91, 0.92), (0.31, 0.32), originals_before=(0.9, 0.9), originals_after=(0.11, 0.12))
    before, after = grid(verdict=made).stages
    assert [row.limit for row in before.figures] == [made.limits.remaining, None]
    assert [row.limit for row in after.figures] == [made.limits.remaining, made.limits.diversity, None]


def test_a_seed_without_an_image_and_an_image_without_figures_are_shown_without_the_other(
    grid: Callable[..., Grid], verdict: Callable[..., Verdict]
) -> None:
    shown = grid(PromptImages(before={2: IMAGE, 9: IMAGE}), verdict=verdict())
    assert shown.seeds == (1, 2, 9)
    before, after = shown.stages
    assert [cell.uri is not None for cell in before.cells] == [False, True, True]
    assert before.figures[0].values == (0.91, 0.92, None)
    assert [cell.marks for cell in before.cells][2] == ()
    assert [cell.uri for cell in after.cells] == [None] * 3


def test_images_that_nobody_checked_have_no_marks(grid: Callable[..., Grid]) -> None:
    (stage,) = grid(PromptImages(after={1: IMAGE})).stages
    assert stage.figures == ()
    assert stage.cells[0].marks == ()
    assert stage.cells[0].alt == "Prompt 1, seed 1, 2 neurons off"


def test_an_image_is_marked_if_it_replicates_before_or_among_the_others_after(
    grid: Callable[..., Grid], verdict: Callable[..., Verdict]
) -> None:
    made = verdict((0.9,) * 3, final=ImageTrial(2, "", None, remaining=(0.8, 0.3, 0.45), diversity=(0.1, 0.8, 0.7)))
    cells = grid(verdict=made).stages[1].cells
    still, differs = Mark("bad", "still replicates"), Mark("good", "differs")
    assert [cell.marks for cell in cells] == [(still,), (still,), (differs,)]
    assert cells[0].alt.endswith("still replicates")


def test_an_image_of_another_prompt_is_no_success_and_its_prompt_is_named(
    grid: Callable[..., Grid], verdict: Callable[..., Verdict]
) -> None:
    shown = grid(verdict=verdict((0.9,) * 3, (0.3,) * 3, instead=("another", "unlisted", "another")))
    assert shown.stages[1].cells[0].marks == (Mark("plain", "differs"), Mark("bad", "another image"))
    assert [(one.prompt, one.seeds, one.number) for one in shown.substitutes] == [
        ("another", (1, 3), 5),
        ("unlisted", (2,), None),
    ]


def test_a_prompt_that_was_not_searched_has_no_images_after(
    grid: Callable[..., Grid], verdict: Callable[..., Verdict]
) -> None:
    (stage,) = grid(memorized=False, verdict=verdict((0.3, 0.6))).stages
    assert stage.title == "Before: the untouched model"
    assert [cell.marks for cell in stage.cells] == [(), ()]
    assert stage.figures[0].limit == 0.5


def test_without_images_and_verdict_there_is_no_grid(localization: Callable[..., Localization]) -> None:
    assert image_grid(localization(), None, number=1) is None
    assert image_grid(localization(), PromptImages(), number=1) is None
