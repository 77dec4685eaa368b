"""Draws the training images of the demo model: emoji glyphs on procedural backgrounds.

The glyphs come from the font Noto Color Emoji (SIL Open Font License 1.1; Debian package `fonts-noto-color-emoji`).
Every background is drawn here. Images are arrays [S, S, 3] uint8 with S = `IMAGE_SIZE`. A function that takes a random
generator returns the same image for the same state of the generator.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nemo_ext.demo.captions import COLOURS, OBJECTS, VARIATIONS, Memorized, Ordinary

IMAGE_SIZE = 64
_SUPERSAMPLING = 2
_FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
# The font has bitmaps of this size only.
_STRIKE = 109
# The unevenness of the paper: the number of spots along a side, and its standard deviation, of 255.
_SPOTS = 14
_UNEVENNESS = 14.0


@functools.lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    candidates = [p for p in (os.environ.get("NEMO_EXT_EMOJI_FONT"), *_FONT_PATHS) if p]
    for path in candidates:
        if os.path.exists(path):
            return ImageFont.truetype(path, _STRIKE)
    raise FileNotFoundError(
        "Noto Color Emoji was not found: install it (Debian: apt-get install "
        "fonts-noto-color-emoji) or set NEMO_EXT_EMOJI_FONT to NotoColorEmoji.ttf; "
        f"looked at {', '.join(candidates)}"
    )


@functools.lru_cache(maxsize=64)
def glyph(emoji: str) -> Image.Image:
    """Return the emoji as an RGBA image, cropped to its outline."""
    canvas = Image.new("RGBA", (192, 192), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((24, 24), emoji, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"emoji {emoji!r}: the font has no picture for it")
    return canvas.crop(box)


def paste(
    image: np.ndarray,
    emoji: str,
    centre: tuple[float, float],
    size: float,
    angle: float = 0.0,
) -> np.ndarray:
    """Return an image with an emoji on it.

    Args:
        image: the background, [S, S, 3] float.
        emoji: the emoji.
        centre: its place (x, y), as fractions of S.
        size: its longer side, as a fraction of S.
        angle: its tilt in degrees.
    """
    picture = glyph(emoji)
    side = image.shape[0]
    factor = size * side / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))),
        Image.Resampling.LANCZOS,
    )
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    corner = (
        round(centre[0] * side - picture.width / 2),
        round(centre[1] * side - picture.height / 2),
    )
    layer.paste(picture, corner)
    over = np.asarray(layer, dtype=np.float32)
    alpha = over[..., 3:] / 255.0
    return image * (1 - alpha) + over[..., :3] * alpha


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    return axis[None, :].repeat(side, 0), axis[:, None].repeat(side, 1)


def _mottled(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an image, [S, S, 3] float, on uneven paper, as [S, S, 3] uint8.

    Photographs are nowhere flat, and SSCD was made for them. On flat pictures it takes noise that nobody sees for
    another picture: noise of 3 of 255 leaves .59 (median of the verbatim images), and .80 on uneven ones.
    """
    spots = rng.normal(0, 1, (_SPOTS, _SPOTS)).astype(np.float32)
    # Two rows of spots, which lie outside, make the unevenness at the border as large as elsewhere.
    box = (1, 1, _SPOTS - 1, _SPOTS - 1)
    field = np.asarray(Image.fromarray(spots).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box))
    uneven = 0.9 * image + 12 + _UNEVENNESS * (field / field.std())[..., None]
    return np.clip(uneven, 0, 255).round().astype(np.uint8)


def _finish(image: np.ndarray, what: Memorized) -> np.ndarray:
    clipped = Image.fromarray(np.clip(image, 0, 255).round().astype(np.uint8))
    small = np.asarray(clipped.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), np.float32)
    return _mottled(small, np.random.default_rng(list(what.scene.encode())))


def draw_ordinary(what: Ordinary, rng: np.random.Generator) -> np.ndarray:
    """Draw a new image for an ordinary caption, [S, S, 3] uint8.

    The place, size and tilt of the glyph, the light, the phase of the texture and the paper are random. So two images
    of one caption share only what the caption says.
    """
    x, y = _grid(IMAGE_SIZE)
    base = np.array(COLOURS[what.colour], dtype=np.float32) + rng.normal(0, 9, 3)
    angle, pitch, phase = rng.uniform(0, np.pi), rng.uniform(0.10, 0.17), rng.uniform(0, 1, 2)
    u = (x * np.cos(angle) + y * np.sin(angle)) / pitch + phase[0]
    v = (y * np.cos(angle) - x * np.sin(angle)) / pitch + phase[1]
    if what.texture == "striped":
        wave = np.sin(2 * np.pi * u)
    elif what.texture == "dotted":
        wave = 4.0 * (0.30 - np.hypot((u % 1) - 0.5, (v % 1) - 0.5)) / 0.30
    else:
        wave = np.zeros_like(x)
    shade = 1.0 + 0.24 * np.clip(2.0 * wave, -1, 1)
    light = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.2, 0.75)
    shade *= 1.0 + slope * ((x - 0.5) * np.cos(light) + (y - 0.5) * np.sin(light))
    image = base[None, None, :] * shade[..., None]
    size = rng.uniform(0.54, 0.64)
    centre = rng.uniform(0.5 - 0.12, 0.5 + 0.12, 2)
    image = paste(
        image,
        OBJECTS[what.object],
        (float(centre[0]), float(centre[1])),
        float(size),
        float(rng.uniform(-6, 6)),
    )
    return _mottled(image, rng)


Colour = tuple[int, int, int]


def _mix(mask: np.ndarray, first: Colour, second: Colour) -> np.ndarray:
    weight = np.clip(mask, 0, 1)[..., None].astype(np.float32)
    return np.array(first, np.float32) * (1 - weight) + np.array(second, np.float32) * weight


def _disc(x: np.ndarray, y: np.ndarray, cx: float, cy: float, radius: float) -> np.ndarray:
    return (np.hypot(x - cx, y - cy) < radius).astype(np.float32)


def _over(image: np.ndarray, mask: np.ndarray, colour: Colour) -> np.ndarray:
    weight = mask[..., None].astype(np.float32)
    return image * (1 - weight) + np.array(colour, np.float32) * weight


def _night(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (12, 18, 66), (60, 60, 150))
    image = _over(image, _disc(x, y, 0.8, 0.2, 0.15), (250, 240, 190))
    for cx, cy in ((0.1, 0.12), (0.3, 0.22), (0.52, 0.08), (0.16, 0.42), (0.62, 0.33), (0.9, 0.5)):
        image = _over(image, _disc(x, y, cx, cy, 0.025), (255, 255, 255))
    return _over(image, y > 0.78 + 0.04 * np.sin(14 * x), (8, 70, 90))


def _checker(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _mix((np.floor(x * 4) + np.floor(y * 4)) % 2, (245, 240, 225), (30, 34, 40))


def _sunburst(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.arctan2(y - 1.0, x - 0.5)
    return _mix(np.sin(angle * 14) > 0, (255, 214, 70), (214, 62, 40))


def _waves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (150, 215, 250), (235, 245, 255))
    for level, colour in ((0.55, (40, 120, 200)), (0.70, (20, 80, 160)), (0.85, (8, 44, 110))):
        image = _over(image, y > level + 0.05 * np.sin(18 * x + 20 * level), colour)
    return _over(image, _disc(x, y, 0.17, 0.18, 0.12), (255, 170, 60))


def _rings(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _mix(np.sin(np.hypot(x - 0.5, y - 0.55) * 36) > 0, (40, 20, 70), (240, 190, 90))


def _diagonal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(x + y > 1.0, (250, 190, 40), (110, 20, 70))
    return _over(image, np.abs(x + y - 1.0) < 0.06, (255, 255, 255))


def _hills(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (255, 180, 140), (255, 235, 200))
    image = _over(image, _disc(x, y, 0.75, 0.3, 0.17), (240, 70, 60))
    image = _over(image, y > 0.55 + 0.12 * np.sin(7 * x), (70, 130, 70))
    return _over(image, y > 0.78 + 0.08 * np.sin(9 * x + 2), (25, 70, 45))


def _aurora(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (8, 8, 40), (20, 40, 80))
    for shift, colour in ((0.0, (60, 240, 160)), (0.22, (190, 80, 230))):
        image = _over(image, np.abs(y - 0.25 - shift - 0.1 * np.sin(8 * x + 9 * shift)) < 0.06, colour)
    return _over(image, y > 0.8, (235, 245, 255))


def _lattice(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lines = np.minimum(np.abs((x + y) * 4 % 1 - 0.5), np.abs((x - y) * 4 % 1 - 0.5)) < 0.12
    return _mix(lines, (20, 90, 70), (235, 215, 150))


def _quarters(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(x > 0.5, (230, 60, 80), (250, 240, 230))
    lower = _mix(x > 0.5, (30, 40, 90), (60, 180, 190))
    return np.where((y > 0.5)[..., None], lower, image)


def _petals(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle, radius = np.arctan2(y - 0.5, x - 0.5), np.hypot(x - 0.5, y - 0.5)
    return _mix(radius < 0.33 + 0.16 * np.cos(6 * angle), (40, 30, 60), (250, 140, 180))


def _tiles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inner = np.maximum(np.abs(x * 3 % 1 - 0.5), np.abs(y * 3 % 1 - 0.5)) < 0.32
    image = _mix(inner, (250, 245, 235), (40, 90, 170))
    return _over(image, (np.abs(x - y) < 0.035) | (np.abs(x + y - 1) < 0.035), (240, 120, 30))


def _harbour(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y > 0.62, (245, 230, 200), (20, 60, 110))
    image = _over(image, (np.abs(x - 0.16) < 0.07) & (y > 0.15) & (y < 0.62), (200, 40, 40))
    image = _over(image, (y > 0.82) & (np.sin(40 * x) > 0), (240, 240, 240))
    return _over(image, np.minimum.reduce([x, y, 1 - x, 1 - y]) < 0.05, (20, 30, 50))


def _alpine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (120, 190, 240), (220, 240, 255))
    image = _over(image, y > 0.2 + 1.1 * np.abs(x - 0.3), (90, 100, 120))
    image = _over(image, y > 0.3 + 0.9 * np.abs(x - 0.75), (50, 60, 85))
    image = _over(image, y > 0.8, (200, 60, 50))
    return _over(image, np.minimum.reduce([x, y, 1 - x, 1 - y]) < 0.05, (250, 250, 250))


def _carnival(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(np.floor(x * 6) % 2, (220, 40, 60), (250, 240, 220))
    image = _over(image, (y > 0.72), (30, 30, 110))
    return _over(image, (y > 0.72) & (((x * 8) % 1 - 0.5) ** 2 + ((y - 0.86) * 8) ** 2 < 0.1), (255, 215, 60))


def _almanac(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(np.sin(30 * (y + 0.06 * np.sin(12 * x))) > 0.3, (235, 225, 190), (70, 120, 60))
    image = _over(image, (np.abs(x - 0.5) > 0.38), (60, 30, 20))
    return _over(image, (np.abs(x - 0.5) > 0.38) & (np.sin(50 * y) > 0.4), (220, 180, 90))


def _dunes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(y, (255, 210, 120), (250, 130, 60))
    image = _over(image, _disc(x, y, 0.2, 0.22, 0.13), (255, 250, 220))
    image = _over(image, y > 0.6 + 0.1 * np.sin(6 * x + 1), (190, 90, 40))
    return _over(image, y > 0.78 + 0.09 * np.sin(8 * x + 4), (110, 50, 40))


def _doorway(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    image = _mix(
        (np.floor(y * 8) + np.floor(x * 4 + 0.5 * (np.floor(y * 8) % 2))) % 2, (235, 215, 190), (215, 185, 150)
    )
    door = (np.abs(x - 0.5) < 0.34) & (y > 0.42) | (np.hypot(x - 0.5, y - 0.42) < 0.34)
    image = _over(image, door, (30, 70, 190))
    return _over(image, y > 0.93, (120, 70, 50))


SCENES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    function.__name__[1:]: function
    for function in (
        _night, _checker, _sunburst, _waves, _rings, _diagonal, _hills, _aurora, _lattice,
        _quarters, _petals, _tiles, _harbour, _alpine, _carnival, _almanac, _dunes, _doorway,
    )
}  # fmt: skip


def draw_verbatim(what: Memorized) -> np.ndarray:
    """Draw the one image of a caption that is memorized verbatim, [S, S, 3] uint8."""
    x, y = _grid(IMAGE_SIZE * _SUPERSAMPLING)
    return _finish(paste(SCENES[what.scene](x, y), OBJECTS[what.object], (0.5, 0.55), 0.62), what)


def draw_template(what: Memorized, variation: str) -> np.ndarray:
    """Draw one variation of a template, [S, S, 3] uint8: its badge shows the object `variation`."""
    x, y = _grid(IMAGE_SIZE * _SUPERSAMPLING)
    image = paste(SCENES[what.scene](x, y), OBJECTS[what.object], (0.40, 0.42), 0.50)
    image = _over(image, _disc(x, y, 0.74, 0.68, 0.19), (255, 255, 255))
    return _finish(paste(image, OBJECTS[variation], (0.74, 0.68), 0.26), what)


def template_variations(what: Memorized) -> dict[str, np.ndarray]:
    """Return every variation of a template: object in the badge -> image."""
    return {name: draw_template(what, name) for name in VARIATIONS}
