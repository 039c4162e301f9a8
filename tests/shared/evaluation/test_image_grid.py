from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.evaluation.image_grid import GridRow, draw_grid, save_grid


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def count_of(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_a_saved_grid_shows_every_image_whole_and_in_order(tmp_path: Path) -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    rows = [
        GridRow("two", [("condition", plain(200, 180, red)), ("generated", plain(190, 200, green))]),
        GridRow("one", [("condition", plain(200, 200, blue))]),
    ]
    save_grid(tmp_path / "validation" / "grid.png", rows)
    picture = np.asarray(Image.open(tmp_path / "validation" / "grid.png"))
    assert count_of(picture, red) == 200 * 180
    assert count_of(picture, green) == 190 * 200
    assert count_of(picture, blue) == 200 * 200
    positions = {
        name: np.argwhere((picture == colour).all(axis=-1))
        for name, colour in zip("rgb", (red, green, blue), strict=True)
    }
    assert positions["r"][:, 1].max() < positions["g"][:, 1].min()
    assert positions["g"][:, 0].max() < positions["b"][:, 0].min()


@settings(max_examples=30, deadline=None)
@given(heading=st.text(max_size=400), caption=st.text(max_size=120))
def test_any_text_fits_into_the_grid(heading: str, caption: str) -> None:
    """Text makes a grid taller, never wider, and covers no image."""
    image = plain(40, 200, (1, 2, 3))
    without = draw_grid([GridRow("", [("", image)])])
    with_text = draw_grid([GridRow(heading, [(caption, image)])])
    assert with_text.width == without.width
    assert with_text.height >= without.height
    pixels = np.asarray(with_text)
    assert count_of(pixels, (1, 2, 3)) == 40 * 200
    margin = np.concatenate([pixels[:, :8].reshape(-1, 3), pixels[:, -8:].reshape(-1, 3)])
    assert (margin == 255).all()


def test_long_text_is_drawn_over_several_lines() -> None:
    image = plain(40, 200, (1, 2, 3))
    one_line = draw_grid([GridRow("word", [("", image)])])
    many_lines = draw_grid([GridRow("word " * 60 + "x" * 300, [("", image)])])
    assert many_lines.height > one_line.height + 100


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        draw_grid([GridRow("", [("", np.zeros((4, 4, 3)))])])
    with pytest.raises(ValueError, match="at least one image"):
        draw_grid([])


@pytest.mark.parametrize("text", ["half an emoji \ud83d", "a\0b\x1b[31m", "猫 🐈 \u202e", "no \udcff utf-8"])
def test_what_is_no_text_is_drawn_escaped(text: str) -> None:
    image = plain(40, 200, (1, 2, 3))
    draw_grid([GridRow(text, [(text, image)])], [text])


def test_a_caption_of_many_megabytes_is_drawn_as_far_as_anybody_would_read() -> None:
    image = plain(40, 200, (1, 2, 3))
    for caption in ("word " * 10**7, "x" * (5 * 10**7)):
        assert draw_grid([GridRow(caption, [("", image)])]).height < 4000
