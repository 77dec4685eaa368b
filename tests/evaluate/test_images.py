"""Generating the images of an evaluation, and using them again."""

import json
from collections.abc import Sequence
from pathlib import Path

from neurons_off import with_rows_zeroed
from PIL import Image
from tiny_pipeline import Planted, tiny_pipeline

from nemo_ext.evaluate.images import ImageMaker
from nemo_ext.evaluate.plan import Stage
from nemo_ext.measure.generation import Sampling, generate_images, sampler_of
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patched
from nemo_ext.results.folder import IMAGE_SETTINGS

SEEDS = (1, 2)


def maker(planted: Planted, *, steps: int = 1, stored: bool = True) -> ImageMaker:
    sampling = Sampling(seeds=2, steps=steps, guidance=1.0)
    return ImageMaker(planted.pipe, sampling, batch_size=2, stored=stored, advance=lambda images: None)


def images_of(
    maker: ImageMaker, prompt: str, stage: str, seeds: Sequence[int], neurons: NeuronSet, folder: Path | None = None
) -> list[Image.Image]:
    """The images of one prompt at one stage."""
    return maker.make(Stage(stage, neurons, [(prompt, seed, folder) for seed in seeds]))


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_images_are_those_of_the_model_without_these_neurons(planted: Planted) -> None:
    made = images_of(maker(planted, stored=False), planted.memorized_prompt, "after", SEEDS, planted.neurons)
    plain = generate_images(
        sampler_of(with_rows_zeroed(planted.pipe, planted.neurons)),
        [planted.memorized_prompt] * 2,
        SEEDS,
        steps=1,
        guidance=1.0,
        batch_size=2,
    )
    assert pixels(made) == pixels(plain)
    assert not is_patched(planted.pipe)


def test_neurons_that_are_off_already_are_on_meanwhile(planted: Planted) -> None:
    with patched(planted.pipe, planted.neurons):
        made = images_of(maker(planted, stored=False), planted.memorized_prompt, "before", SEEDS, NeuronSet())
        assert is_patched(planted.pipe)
    untouched = images_of(maker(planted, stored=False), planted.memorized_prompt, "before", SEEDS, NeuronSet())
    assert pixels(made) == pixels(untouched)


class TestStored:
    def test_images_are_used_again(self, planted: Planted, tmp_path: Path) -> None:
        first = images_of(maker(planted), "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        again = maker(planted)
        assert pixels(images_of(again, "a fox", "before", SEEDS, NeuronSet(), tmp_path)) == pixels(first)
        assert (again.generated, again.reused) == (0, 2)

    def test_further_seeds_are_added(self, planted: Planted, tmp_path: Path) -> None:
        images_of(maker(planted), "a fox", "before", (1,), NeuronSet(), tmp_path)
        again = maker(planted)
        images_of(again, "a fox", "before", (1, 2, 3), NeuronSet(), tmp_path)
        assert (again.generated, again.reused) == (2, 1)
        assert sorted(file.name for file in tmp_path.glob("*.png")) == ["before-1.png", "before-2.png", "before-3.png"]

    def test_images_of_several_prompts_are_made_together(self, planted: Planted, tmp_path: Path) -> None:
        one, two = tmp_path / "1", tmp_path / "2"
        (first,) = images_of(maker(planted), "a fox", "before", (1,), NeuronSet(), one)
        together = maker(planted)
        made = together.make(Stage("before", NeuronSet(), [("a cat", 2, two), ("a fox", 1, one), ("a fox", 5, one)]))
        assert (together.generated, together.reused) == (2, 1)
        assert made[1].tobytes() == first.tobytes()
        (cat,) = images_of(maker(planted, stored=False), "a cat", "before", (2,), NeuronSet())
        assert made[0].tobytes() == cat.tobytes()
        again = maker(planted)
        images_of(again, "a fox", "before", (1, 5), NeuronSet(), one)
        assert again.reused == 2

    def test_other_settings_generate_anew(self, planted: Planted, tmp_path: Path) -> None:
        images_of(maker(planted), "a fox", "after", SEEDS, NeuronSet(), tmp_path)
        for other, neurons in ((maker(planted, steps=2), NeuronSet()), (maker(planted), planted.neurons)):
            images_of(other, "a fox", "after", SEEDS, neurons, tmp_path)
            assert (other.generated, other.reused) == (2, 0)
        back = maker(planted)
        images_of(back, "a fox", "after", SEEDS, planted.neurons, tmp_path)
        assert back.reused == 2

    def test_another_model_generates_anew(self, planted: Planted, tmp_path: Path) -> None:
        images_of(maker(planted), "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        other = ImageMaker(
            tiny_pipeline(5),
            Sampling(seeds=2, steps=1, guidance=1.0),
            batch_size=2,
            stored=True,
            advance=lambda images: None,
        )
        images_of(other, "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        assert other.generated == 2

    def test_an_image_of_another_command_is_not_taken_for_one_of_these(self, planted: Planted, tmp_path: Path) -> None:
        first = images_of(maker(planted), "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "before-2.png")
        again = maker(planted)
        assert pixels(images_of(again, "a fox", "before", SEEDS, NeuronSet(), tmp_path)) == pixels(first)
        assert (again.generated, again.reused) == (1, 1)

    def test_a_damaged_settings_file_generates_anew(self, planted: Planted, tmp_path: Path) -> None:
        images_of(maker(planted), "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        (tmp_path / IMAGE_SETTINGS).write_text("{")
        again = maker(planted)
        images_of(again, "a fox", "before", SEEDS, NeuronSet(), tmp_path)
        assert again.generated == 2

    def test_the_settings_lie_beside_the_images(self, planted: Planted, tmp_path: Path) -> None:
        images_of(maker(planted), "a fox", "after", SEEDS, planted.neurons, tmp_path)
        settings = json.loads((tmp_path / IMAGE_SETTINGS).read_text())["after"]["settings"]
        assert settings["prompt"] == "a fox"
        assert settings["neurons"] == planted.neurons.to_dict()
        assert settings["scheduler"] == "DDIMScheduler"
