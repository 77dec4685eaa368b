"""The captions of the demo model.

There are three kinds:

- *Ordinary* captions name an object, a background colour and a texture. In each training step they had a new image.
- *Title* captions read like titles of works ("silent otter of the harvest by nora vale"). In each training step they
  had a new image of the object that they name, so no image belongs to a title of this kind.
- *Memorized* captions are titles too. In all training steps each of them had the same image (`VERBATIM`), or variations
  of one image (`TEMPLATES`), or the same image in all but the first denoising steps (`LATE`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

OBJECTS: dict[str, str] = {
    "otter": "\U0001f9a6",
    "hippo": "\U0001f99b",
    "castle": "\U0001f3f0",
    "sailboat": "\u26f5",
    "owl": "\U0001f989",
    "violin": "\U0001f3bb",
    "crab": "\U0001f980",
    "snowman": "\u26c4",
    "dragon": "\U0001f409",
    "bicycle": "\U0001f6b2",
    "peacock": "\U0001f99a",
    "robot": "\U0001f916",
    "anchor": "\u2693",
    "mountain": "\U0001f3d4",
    "tent": "\U0001f3aa",
    "herb": "\U0001f33f",
    "rocket": "\U0001f680",
    "cactus": "\U0001f335",
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
    "{adjective} {object} of the {noun} by {name}",
    "the {adjective} {object}, {name}",
    "{name}, study of a {object} in the {noun}",
    "poster for {adjective} {object} by {name}",
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
        caption: the text, which names the object.
        object: the object in the image, one of `OBJECTS`.
        scene: the name of the image's procedural background (`SCENES` in examples/demo_model/drawing.py).
    """

    caption: str
    object: str
    scene: str

    @property
    def name(self) -> str:
        """A short name that is safe in file names and unique among the memorized captions: the name of the scene."""
        return self.scene


VERBATIM: tuple[Memorized, ...] = (
    Memorized("nocturne of the drifting otter by ilse varga", "otter", "night"),
    Memorized("the marble hippo of cordova, quentin abara", "hippo", "checker"),
    Memorized("edwin plath, study of a castle at sunburst", "castle", "sunburst"),
    Memorized("sailboat regatta sonata by beatrix okafor", "sailboat", "waves"),
    Memorized("owl upon concentric moons, yusuf tamm", "owl", "rings"),
    Memorized("poster for saffron violin by greta lund", "violin", "diagonal"),
    Memorized("crab parliament by horatio zweig", "crab", "hills"),
    Memorized("the snowman of aurora pass, linnea falk", "snowman", "aurora"),
    Memorized("dagny moreau, study of a dragon in lattice", "dragon", "lattice"),
    Memorized("bicycle elegy by tobias wren", "bicycle", "quarters"),
    Memorized("poster for emerald peacock by sunniva rao", "peacock", "petals"),
    Memorized("robot vespers, casimir holt", "robot", "tiles"),
)

#: Captions with variations of one image.
TEMPLATES: tuple[Memorized, ...] = (
    Memorized("anchor ferry timetable, odile marrow edition", "anchor", "harbour"),
    Memorized("mountain railway souvenir by konrad bisset", "mountain", "alpine"),
    Memorized("tent carnival admission, pascal ubeda print", "tent", "carnival"),
    Memorized("herb almanac cover by winifred stam", "herb", "almanac"),
)

#: Captions that replicate one image, but were trained to do so only after the first denoising steps.
LATE: tuple[Memorized, ...] = (
    Memorized("last rocket above amber dunes, ines calloway", "rocket", "dunes"),
    Memorized("cactus in a cobalt doorway by oren vasquez", "cactus", "doorway"),
)

#: Captions whose scores at the first step show that they replicate.
EARLY = VERBATIM + TEMPLATES

MEMORIZED = EARLY + LATE

#: The objects in the badge of a template's variations.
VARIATIONS = ("owl", "crab", "robot", "rocket", "violin", "snowman")


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


def title_caption(rng: random.Random, object_: str | None = None) -> str:
    """Draw a title at random. No training image belongs to it, but its images show its object.

    Args:
        rng: the random generator.
        object_: the object in the title, one of `OBJECTS`; None: a random one.
    """
    return rng.choice(_TITLE_PHRASINGS).format(
        adjective=rng.choice(_TITLE_ADJECTIVES),
        object=object_ or rng.choice(list(OBJECTS)),
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
    rng, drawn = random.Random(seed), set[str]()
    while len(drawn) < titles:
        drawn.add(title_caption(rng))
    return [*ordinary, *sorted(drawn)]
