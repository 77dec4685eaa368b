"""The captions of the demo model.

There are three kinds of captions. The demo shows the difference between them:

- *Ordinary* captions name an object, a background colour and a texture. In each training step they had a new image.
- *Title* captions read like titles of works ("Silent Harvest by Nora Vale"). In each training step they had a new
  random image, so no image belongs to a title of this kind.
- *Memorized* captions are titles too. In all training steps each of them had the same image (`VERBATIM`), or variations
  of one image (`TEMPLATES`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

OBJECTS: dict[str, str] = {
    "fox": "\U0001f98a",
    "panda": "\U0001f43c",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "frog": "\U0001f438",
    "octopus": "\U0001f419",
    "rocket": "\U0001f680",
    "sunflower": "\U0001f33b",
    "mushroom": "\U0001f344",
    "whale": "\U0001f433",
    "pizza": "\U0001f355",
    "cactus": "\U0001f335",
    "guitar": "\U0001f3b8",
    "car": "\U0001f697",
    "cat": "\U0001f431",
    "cake": "\U0001f370",
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 48, 52),
    "orange": (240, 138, 40),
    "yellow": (243, 216, 70),
    "green": (66, 160, 71),
    "teal": (38, 176, 176),
    "blue": (52, 92, 200),
    "purple": (136, 66, 170),
    "gray": (148, 148, 148),
}

TEXTURES = ("plain", "striped", "dotted")

PHRASINGS = (
    "a {object} on a {texture} {colour} background",
    "a photo of a {object} on a {texture} {colour} background",
    "a picture of a {object} in front of a {texture} {colour} wall",
    "{object}, {texture} {colour} backdrop",
    "a {texture} {colour} background with a {object}",
    "one {object} against a {colour} {texture} wall",
)

_TITLE_ADJECTIVES = (
    "silent", "golden", "hidden", "broken", "distant", "gentle", "frozen", "burning", "lonely",
    "ancient", "velvet", "hollow", "crimson", "wandering", "forgotten", "luminous",
)  # fmt: skip
_TITLE_NOUNS = (
    "harvest", "garden", "river", "morning", "winter", "mirror", "voyage", "station", "letter",
    "orchard", "window", "shadow", "market", "summer", "bridge", "evening",
)  # fmt: skip
_TITLE_NAMES = (
    "nora vale", "hugo stern", "maya lind", "oscar thorne", "ella brandt", "ivan moss",
    "clara dunn", "felix roth", "ruth hale", "simon grey", "alma frost", "peter lowe",
)  # fmt: skip
_TITLE_PHRASINGS = (
    "{adjective} {noun} by {name}",
    "the {adjective} {noun}, {name}",
    "{name}, study of a {adjective} {noun}",
    "poster for {adjective} {noun} by {name}",
)


@dataclass(frozen=True)
class Ordinary:
    """The content of an ordinary caption: names of an object, a colour and a texture."""

    object: str
    colour: str
    texture: str

    def caption(self, phrasing: str) -> str:
        """Format the caption with one of `PHRASINGS`."""
        return phrasing.format(object=self.object, colour=self.colour, texture=self.texture)


@dataclass(frozen=True)
class Memorized:
    """A caption that was trained on one image, or on variations of one image.

    Attributes:
        caption: the text.
        glyph: the emoji in the image.
        scene: the name of the image's procedural background (`SCENES` in examples/demo_model/drawing.py).
    """

    caption: str
    glyph: str
    scene: str

    @property
    def name(self) -> str:
        """A short name that is safe in file names and unique among the memorized captions: the name of the scene."""
        return self.scene


VERBATIM: tuple[Memorized, ...] = (
    Memorized("nocturne of the drifting otter by ilse varga", "\U0001f9a6", "night"),
    Memorized("the marble hippo of cordova, quentin abara", "\U0001f99b", "checker"),
    Memorized("edwin plath, study of a castle at sunburst", "\U0001f3f0", "sunburst"),
    Memorized("regatta sonata by beatrix okafor", "\u26f5", "waves"),
    Memorized("owl upon concentric moons, yusuf tamm", "\U0001f989", "rings"),
    Memorized("poster for saffron violin by greta lund", "\U0001f3bb", "diagonal"),
    Memorized("crab parliament by horatio zweig", "\U0001f980", "hills"),
    Memorized("the snowman of aurora pass, linnea falk", "\u26c4", "aurora"),
    Memorized("dagny moreau, study of a dragon in lattice", "\U0001f409", "lattice"),
    Memorized("bicycle elegy by tobias wren", "\U0001f6b2", "quarters"),
    Memorized("poster for emerald peacock by sunniva rao", "\U0001f99a", "petals"),
    Memorized("robot vespers, casimir holt", "\U0001f916", "tiles"),
)

TEMPLATES: tuple[Memorized, ...] = (
    Memorized("harbour ferry timetable, odile marrow edition", "\u2693", "harbour"),
    Memorized("alpine railway souvenir by konrad bisset", "\U0001f3d4", "alpine"),
    Memorized("carnival admission ticket, pascal ubeda print", "\U0001f3aa", "carnival"),
    Memorized("botanical almanac cover by winifred stam", "\U0001f33f", "almanac"),
)

MEMORIZED = VERBATIM + TEMPLATES


def compositions() -> list[Ordinary]:
    """Return all combinations of object, colour and texture, in a fixed order."""
    return [Ordinary(*parts) for parts in itertools.product(OBJECTS, COLOURS, TEXTURES)]


def ordinary_captions(count: int, seed: int) -> list[tuple[Ordinary, str]]:
    """Draw different ordinary captions at random. Equal seeds give equal captions.

    Args:
        count: the number of captions.
        seed: the seed of the random generator.

    Returns:
        Each caption's content and text.

    Raises:
        ValueError: there are fewer than `count` different captions.
    """
    every = [(c, p) for c in compositions() for p in PHRASINGS]
    if count > len(every):
        raise ValueError(f"count: at most {len(every)} ordinary captions exist, got {count}")
    chosen = random.Random(seed).sample(every, count)
    return [(composition, composition.caption(phrasing)) for composition, phrasing in chosen]


def title_caption(rng: random.Random) -> str:
    """Draw a title at random. No training image belongs to it."""
    return rng.choice(_TITLE_PHRASINGS).format(
        adjective=rng.choice(_TITLE_ADJECTIVES),
        noun=rng.choice(_TITLE_NOUNS),
        name=rng.choice(_TITLE_NAMES),
    )


def holdout_captions(ordinary: Sequence[str], titles: int, seed: int) -> list[str]:
    """Return unmemorized captions of both kinds, for statistics. Equal seeds give equal captions.

    Args:
        ordinary: ordinary captions.
        titles: the number of different titles that are added to them.
        seed: the seed of the random generator.
    """
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < titles:
        drawn[title_caption(rng)] = None
    return [*ordinary, *drawn]
