from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data.sources.circles import draw
from shared.evaluation.image_grid import GridRow, draw_grid, enlarge, save_contact_sheet


def plain(colour: tuple[int, int, int], size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of one colour, which fill a rectangle."""
    rows, columns = np.nonzero((picture == colour).all(axis=-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def colour(row: int, column: int) -> tuple[int, int, int]:
    return (200, 10 + 40 * row, 10 + 40 * column)


def test_rows_and_columns_stand_in_order_and_small_pictures_are_enlarged(tmp_path: Path) -> None:
    titles = ("one", "two", "three", "four")
    columns = {title: [plain(colour(row, column)) for row in range(3)] for column, title in enumerate(titles)}
    save_contact_sheet(tmp_path / "demo" / "sheet.png", [f"caption {row}" for row in range(3)], columns)
    sheet = np.asarray(Image.open(tmp_path / "demo" / "sheet.png"))
    areas = [[area(sheet, colour(row, column)) for column in range(4)] for row in range(3)]
    for row in range(3):
        for column in range(4):
            left, top, right, bottom = areas[row][column]
            assert (right - left, bottom - top) == (192, 192)
            assert (left, right) == (areas[0][column][0], areas[0][column][2])
            assert (top, bottom) == (areas[row][0][1], areas[row][0][3])
        assert all(areas[row][column][2] < areas[row][column + 1][0] for column in range(3))
        above = areas[row - 1][0][3] if row else 0
        assert (sheet[above : areas[row][0][1]] < 128).any(), "no caption above the row"
    assert all(areas[row][0][3] < areas[row + 1][0][1] for row in range(2))


def test_large_pictures_keep_their_size(tmp_path: Path) -> None:
    columns = {str(column): [plain(colour(0, column), 256)] for column in range(4)}
    save_contact_sheet(tmp_path / "sheet.png", ["a caption"], columns)
    left, top, right, bottom = area(np.asarray(Image.open(tmp_path / "sheet.png")), colour(0, 3))
    assert (right - left, bottom - top) == (256, 256)


def test_each_column_has_its_title_above_it() -> None:
    image = plain((1, 2, 3), 200)
    row = GridRow("", [("", image)] * 4)
    without = np.asarray(draw_grid([row]))
    for column in range(4):
        titles = ["x" if index == column else "" for index in range(4)]
        titled = np.asarray(draw_grid([row], titles))
        added = len(titled) - len(without)
        assert added > 0
        _, columns = np.nonzero((titled[:added] != 255).any(axis=-1))
        left = 16 + column * 208
        assert left - 2 <= columns.min()  # letters overhang
        assert columns.max() < left + 200


def test_more_titles_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="1 columns cannot have 2 titles"):
        draw_grid([GridRow("", [("", plain((0, 0, 0)))])], ["a", "b"])


def test_enlarging_repeats_whole_pixels() -> None:
    image = np.asarray(draw(0, 40, 0).image)
    large = enlarge(image, 100)
    assert large.shape == (120, 120, 3)
    np.testing.assert_array_equal(
        large, np.asarray(Image.fromarray(image).resize((120, 120), Image.Resampling.NEAREST))
    )
    np.testing.assert_array_equal(enlarge(image, 7), image)
    assert enlarge(image[:20], 40).shape == (40, 80, 3)
