"""Numbers on the page, and the differences of pictures."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.compare.page import figures
from shared.compare.page.pictures import (
    AMPLIFICATION,
    Allowance,
    PictureFile,
    Pixels,
    amplified,
    as_png,
    difference,
    measure,
    read_picture,
)
from tests.shared.compare.run_folders import write_picture


def read(path: Path) -> Pixels:
    return read_picture(PictureFile(path, path.parent), Allowance()).pixels_HWC


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.plain(0.018359743), "0.0184"),
        (figures.plain(105.759), "106"),
        (figures.plain(16217.3), "16,217"),
        (figures.plain(0.0), "0"),
        (figures.plain(-0.25), "-0.250"),
        (figures.plain(3.2e-7), "3.2 × 10⁻⁷"),
        (figures.plain(None), "–"),
        (figures.plain(float("nan")), "–"),
        (figures.scientific(1e-3), "1.0 × 10⁻³"),
        (figures.scientific(0.0), "0"),
        (figures.scientific(float("inf")), "infinite"),
        (figures.scientific(0.71), "0.71"),
        (figures.power_of_ten(1e-9), "10⁻⁹"),
        (figures.seconds(0.0213), "21.3 ms"),
        (figures.seconds(1.84), "1.84 s"),
        (figures.duration(16.3), "16.3 s"),
        (figures.duration(191.9), "3 min 12 s"),
        (figures.duration(18420), "5 h 07 min"),
        (figures.gibibytes(None), "–"),
        (figures.percent(0.132), "13%"),
        (figures.change(100, 112), "+12%"),
        (figures.change(100, 88), "−12%"),
        (figures.change(100, 100), "the same"),
        (figures.change(2, 22), "11 ×"),
        (figures.change(None, 22), "–"),
        (figures.difference(0.7, 0.65), "−0.050"),
        (figures.whole(16000), "16,000"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(1e-4, 1e12))
def test_three_digits_say_the_number_to_half_a_percent(value: float) -> None:
    assert float(figures.plain(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


def test_pictures_are_compared_pixel_by_pixel(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(2))
    for name, pixels in (("a", a), ("b", b)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = difference(*(read(tmp_path / f"{name}.png") for name in "ab"))
    assert found is not None
    expected = np.abs(a.astype(float) - b.astype(float))
    np.testing.assert_array_equal(found, expected)
    assert measure(found).mean == pytest.approx(expected.mean())
    assert measure(found).largest == expected.max()
    np.testing.assert_array_equal(amplified(found), np.minimum(expected * AMPLIFICATION, 255))


def test_pictures_of_other_sizes_have_no_difference(tmp_path: Path) -> None:
    a = write_picture(tmp_path / "a.png", 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert difference(read(a), read(tmp_path / "b.png")) is None


def test_differences_are_brightened_without_a_wider_type() -> None:
    levels = np.arange(256, dtype=np.uint8)[None, :, None]
    np.testing.assert_array_equal(amplified(levels), np.minimum(levels.astype(int) * AMPLIFICATION, 255))


def test_a_difference_is_encoded_without_loss_however_large() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    allowance = Allowance(tight_pixels=40)
    for left in (5, 5):
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(as_png(pixels, allowance)))), pixels)
        assert allowance.tight_pixels == left
