"""Differences of coarse colours, against those of known ones and scikit-image."""

import numpy as np
import pytest
import skimage.color
import skimage.data

from shared.evaluate.metrics.base import Measured
from shared.evaluate.metrics.colours import open_colours
from shared.prepare_data.conditions import TypicalDraws, make_condition


class _OneInColours:
    class _Kind:
        channels = 3

    conditions = (_Kind(),)


def difference(condition: np.ndarray, *pictures: np.ndarray) -> float:
    metric = open_colours(_OneInColours())  # type: ignore[arg-type]
    found = metric.measure([Measured(condition, pictures[0], "", list(pictures))])
    return found.figures["colour_difference"].value


def test_a_photograph_has_the_colours_of_its_palette_and_its_blur() -> None:
    photograph = skimage.data.astronaut()
    for name in ("palette", "blur"):
        condition = make_condition(name, photograph, TypicalDraws())  # type: ignore[arg-type]
        own, other = difference(condition, photograph), difference(condition, photograph[::-1].copy())
        assert own < 3
        assert other > 5 * own


def test_flat_colours_differ_by_their_ciede2000() -> None:
    red, blue = (np.full((40, 64, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 30, 200)))
    expected = skimage.color.deltaE_ciede2000(*(skimage.color.rgb2lab(image[0, 0]) for image in (red, blue)))
    assert difference(red, blue) == pytest.approx(float(expected), abs=0.01)
    assert difference(red, red, blue) == pytest.approx(float(expected) / 2, abs=0.01)
