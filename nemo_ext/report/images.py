"""Images for the report, as small copies in data URIs, and contact sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.files import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

#: The longest side of an image in the report, in pixels. The report shows copies, and the files keep the full size.
THUMBNAIL_SIZE = 256


def data_uri(image: Path | Image) -> str:
    """Encode an image as a data URI: JPEG if it has to be scaled down to `THUMBNAIL_SIZE`, and PNG otherwise.

    Raises:
        NemoError: the image cannot be read.
    """
    picture = open_image(image)
    buffer = io.BytesIO()
    if max(picture.size) > THUMBNAIL_SIZE:
        picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        picture.save(buffer, format="JPEG", quality=90)
        return as_uri("image/jpeg", buffer.getvalue())
    picture.save(buffer, format="PNG", optimize=True)
    return as_uri("image/png", buffer.getvalue())


def as_uri(kind: str, content: bytes) -> str:
    """Encode the bytes of a file as a data URI; `kind` is the media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def open_image(image: Path | Image) -> Image:
    """Return an RGB copy of an image, given as a path or as a PIL image.

    Raises:
        NemoError: the file cannot be read as an image.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    copy: Image = image.convert("RGB").copy()
    return copy


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Path | Image | None]]],
    *,
    columns: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    size: int = 128,
) -> Image:
    """Draw images on one sheet, in rows with a name to the left of each row.

    Args:
        rows: the name and the images of each row; None in place of an image leaves its cell empty.
        columns: the names above the columns.
        notes: for each row, a short text under each of its images.
        size: the side of a cell, in pixels. Images are scaled to it.

    Returns:
        The sheet, an RGB image with a white background.

    Raises:
        NemoError: an image cannot be read.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    text_size = max(10, size // 10)
    font = ImageFont.load_default(text_size)
    gap, margin = max(2, size // 32), max(8, size // 16)
    line = int(text_size * 1.3)
    label_width = size + size // 4 if any(name for name, _ in rows) else 0
    header = line + gap if columns else 0
    pitch = size + gap + (line if notes else 0)
    count = max((len(row) for _, row in rows), default=0)
    sheet = images.new(
        "RGB",
        (
            2 * margin + label_width + count * (size + gap),
            2 * margin + header + len(rows) * pitch,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    left = margin + label_width
    for place, name in enumerate(columns[:count]):
        draw.text((left + place * (size + gap), margin), name, fill="black", font=font)
    for number, (name, row) in enumerate(rows):
        top = margin + header + number * pitch
        for place, text in enumerate(_wrap(draw, name, label_width - margin, font, size // line)):
            draw.text((margin, top + place * line), text, fill="black", font=font)
        for place, image in enumerate(row):
            if image is None:
                continue
            picture = open_image(image).resize((size, size), images.Resampling.LANCZOS)
            sheet.paste(picture, (left + place * (size + gap), top))
        for place, note in enumerate(notes[number] if notes else ()):
            draw.text((left + place * (size + gap), top + size + 1), note, fill="black", font=font)
    return sheet


def _wrap(draw: Any, text: str, width: int, font: Any, lines: int) -> list[str]:
    """Break text into lines of at most `width` pixels. After `lines` lines the rest is replaced by an ellipsis."""
    wrapped: list[str] = []
    for word in text.split():
        joined = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and draw.textlength(joined, font=font) <= width:
            wrapped[-1] = joined
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " …"]
    return wrapped
