"""Pictures of pictures, for people to look at: rows of captioned images under a heading, and contact sheets.

H height, W width of an image in pixels, N channels of all conditions.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shared.data.conditions import conditions_in, numbered_conditions
from shared.outgoing.atomic_files import write_atomically
from shared.untrusted.text import harmless
from shared.user_errors import UserError

_MARGIN = 16
_GAP = 8
_HEADING_SIZE, _CAPTION_SIZE = 20, 15
_BACKGROUND, _HEADING_COLOUR, _CAPTION_COLOUR = "#ffffff", "#111111", "#666666"
_NARROWEST_TEXT = 160  # a grid of tiny images still has room for words
_SMALLEST_ON_SHEET = 192  # pixels: smaller images are enlarged, to be looked at without a magnifier

_LONGEST_TEXT = 1000  # characters of a caption or a prompt: more than a text encoder uses, and few enough to draw

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class GridRow(NamedTuple):
    """A heading, such as the prompt, and the images below it: pairs of a caption and a uint8 array [H, W, 3]."""

    heading: str
    images: Sequence[tuple[str, np.ndarray]]


def in_colours(image_HWC: np.ndarray) -> np.ndarray:
    """A condition, of one channel or three, as a picture [H, W, 3] to look at."""
    return np.repeat(image_HWC, 3, axis=-1) if image_HWC.shape[-1] == 1 else image_HWC


def condition_pictures(conditions_HWN: np.ndarray, channels: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Each condition, of as many channels as are told of it, as a captioned picture [H, W, 3] to look at."""
    pictures = map(in_colours, conditions_in(conditions_HWN, channels))
    return list(zip(numbered_conditions(len(channels)), pictures, strict=True))


def enlarge(image: np.ndarray, least_side: int) -> np.ndarray:
    """Repeat the pixels of an image [H, W, ...] as often as it takes to make its shorter side `least_side` or more."""
    factor = -(-least_side // min(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_grid(rows: Sequence[GridRow], column_titles: Sequence[str] = ()) -> Image.Image:
    """One picture of all rows. Images keep their size, cells are as large as the largest; text wraps to fit.

    Raises:
        UserError: no images, an image that is not uint8 [H, W, 3], or more titles than columns.
    """
    images = [image for row in rows for _, image in row.images]
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"An image of the grid is {image.dtype} {image.shape}; expected uint8 [H, W, 3].")
    if not images:
        raise UserError("A grid needs at least one image; got none.")
    cell_width = max(max(image.shape[1] for image in images), _NARROWEST_TEXT)
    columns = max(len(row.images) for row in rows)
    if len(column_titles) > columns:
        raise UserError(f"A grid of {columns} columns cannot have {len(column_titles)} titles; give at most {columns}.")
    width = columns * cell_width + (columns - 1) * _GAP

    titles = [_draw_titles(column_titles, cell_width, width)] if column_titles else []
    drawn = titles + [_draw_row(row, cell_width, width) for row in rows]
    height = sum(row.height for row in drawn) + _MARGIN * (len(drawn) + 1)
    grid = Image.new("RGB", (width + 2 * _MARGIN, height), _BACKGROUND)
    top = _MARGIN
    for row in drawn:
        grid.paste(row, (_MARGIN, top))
        top += row.height + _MARGIN
    return grid


def save_grid(path: Path, rows: Sequence[GridRow], column_titles: Sequence[str] = ()) -> None:
    """`draw_grid` as a PNG file, whole or not at all; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: draw_grid(rows, column_titles).save(temporary, format="PNG"))


def save_contact_sheet(path: Path, headings: Sequence[str], columns: Mapping[str, Iterable[np.ndarray]]) -> None:
    """A row of images under each heading, as a PNG file like `save_grid`'s; small images are enlarged.

    Args:
        columns: of each column its title and an image, uint8 [H, W, 3], for every heading.

    Raises:
        UserError: no rows, or an image that is not uint8 [H, W, 3].
    """
    rows = [
        GridRow(heading, [("", enlarge(image, _SMALLEST_ON_SHEET)) for image in images])
        for heading, *images in zip(headings, *columns.values(), strict=False)
    ]
    save_grid(path, rows, tuple(columns))


def _draw_titles(titles: Sequence[str], cell_width: int, width: int) -> Image.Image:
    font = ImageFont.load_default(_HEADING_SIZE)
    wrapped = [_wrap(title, font, cell_width) for title in titles]
    picture = Image.new("RGB", (width, max(_text_height(title, font) for title in wrapped)), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(wrapped):
        draw.multiline_text((column * (cell_width + _GAP), 0), title, font=font, fill=_CAPTION_COLOUR)
    return picture


def _draw_row(row: GridRow, cell_width: int, width: int) -> Image.Image:
    heading_font, caption_font = ImageFont.load_default(_HEADING_SIZE), ImageFont.load_default(_CAPTION_SIZE)
    heading = _wrap(row.heading, heading_font, width)
    captions = [_wrap(caption, caption_font, cell_width) for caption, _ in row.images]
    heading_height = _text_height(heading, heading_font)
    images_height = max((image.shape[0] for _, image in row.images), default=0)
    captions_height = max((_text_height(caption, caption_font) for caption in captions), default=0)

    picture = Image.new("RGB", (width, heading_height + images_height + captions_height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((0, 0), heading, font=heading_font, fill=_HEADING_COLOUR)
    for column, (_, image) in enumerate(row.images):
        left = column * (cell_width + _GAP)
        picture.paste(Image.fromarray(image), (left, heading_height))
        below = heading_height + images_height + _GAP // 2
        draw.multiline_text((left, below), captions[column], font=caption_font, fill=_CAPTION_COLOUR)
    return picture


def _text_height(text: str, font: _Font) -> int:
    """Height of wrapped text with the gap that sets it off; 0 without text."""
    if not text:
        return 0
    _, _, _, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(bottom) + _GAP


def _wrap(text: str, font: _Font, width: int) -> str:
    """Break text into lines of at most `width` pixels, inside a word where it is too long for a line.

    Of a text that no encoder would use, the beginning; what is no text, such as half an emoji, is escaped.
    """
    lines: list[str] = []
    cut = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
    for word in map(harmless, cut.split()):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.extend(_broken(word, font, width))
    return "\n".join(lines)


def _broken(word: str, font: _Font, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
