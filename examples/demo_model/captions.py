"""The captions of the model that is trained here.

Those of the bundled model, an earlier one, are in nemo_ext/demo/captions.py; what both share comes from there.

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

from nemo_ext.demo.captions import COLOURS as COLOURS
from nemo_ext.demo.captions import PHRASINGS as PHRASINGS
from nemo_ext.demo.captions import TEXTURES as TEXTURES
from nemo_ext.demo.captions import Ordinary as Ordinary

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

MEMORIZED = VERBATIM + TEMPLATES + LATE

#: The objects in the badge of a template's variations.
VARIATIONS = ("owl", "crab", "robot", "rocket", "violin", "snowman")


def compositions() -> list[Ordinary]:
    """Return all combinations of object, colour and texture, in a fixed order."""
    return [Ordinary(*parts) for parts in itertools.product(OBJECTS, COLOURS, TEXTURES)]


def ordinary_captions(count: int, seed: int) -> list[tuple[Ordinary, str]]:
    """Draw `count` different ordinary captions at random: each caption's content and text."""
    every = [(what, what.caption(phrasing)) for what in compositions() for phrasing in PHRASINGS]
    return random.Random(seed).sample(every, count)


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
    """Return ordinary captions and as many different titles as wanted, for statistics."""
    rng, drawn = random.Random(seed), set[str]()
    while len(drawn) < titles:
        drawn.add(title_caption(rng))
    return [*ordinary, *sorted(drawn)]
