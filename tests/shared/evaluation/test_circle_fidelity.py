import math
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.sources.circles import Circle, DrawnCircle, draw
from shared.data.sources.colour_names import READABLE_NAMES, rgb
from shared.evaluation.circles import chance_levels, disc_mask, measure, segment, summarise
from shared.evaluation.colour_difference import ciede2000, srgb_to_lab

COUNT = 60


def circles(size: int = 64, count: int = COUNT) -> list[DrawnCircle]:
    return [draw(index, size, seed=3) for index in range(count)]


def painted(truth: Circle) -> np.ndarray:
    """The picture of a circle by PIL's own rasteriser, eight times as large and reduced."""
    scale = 8
    picture = PIL.Image.new("RGB", (truth.size * scale,) * 2, truth.background)
    (x, y), radius = truth.centre_xy, truth.radius
    box = [(value + sign * radius) * scale for sign in (-1, 1) for value in (x, y)]
    PIL.ImageDraw.Draw(picture).ellipse(box, fill=truth.colour)
    return np.asarray(picture.resize((truth.size, truth.size), PIL.Image.Resampling.BOX))


def circle(x: float, y: float, radius: float, colour: str = "red", background: str = "navy", size: int = 128) -> Circle:
    return Circle(size, (x, y), radius, colour, background)


def lens_iou(radius1: float, radius2: float, distance: float) -> float:
    """Intersection over union of two circles whose borders cross."""
    first = (distance**2 + radius1**2 - radius2**2) / (2 * distance * radius1)
    second = (distance**2 + radius2**2 - radius1**2) / (2 * distance * radius2)
    product = math.prod(
        (
            -distance + radius1 + radius2,
            distance + radius1 - radius2,
            distance - radius1 + radius2,
            distance + radius1 + radius2,
        )
    )
    lens = radius1**2 * math.acos(first) + radius2**2 * math.acos(second) - math.sqrt(product) / 2
    return lens / (math.pi * (radius1**2 + radius2**2) - lens)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_ground_truth_scores_full_marks(size: int) -> None:
    measured = [measure(np.asarray(drawn.image), drawn.truth) for drawn in circles(size)]
    assert min(picture.iou for picture in measured) > 0.98
    scores = summarise(measured)
    assert scores["circle_iou"] > 0.999
    assert scores["color_accuracy"] == 1
    assert scores["color_error"] == 0


@pytest.mark.parametrize(("radius", "dx", "dy"), [(30, 10, 0), (30, 24, -18), (20, 0, 15), (44, 20, 0), (30, 50, 0)])
def test_iou_of_displaced_discs_is_the_geometric_one(radius: float, dx: float, dy: float) -> None:
    asked = circle(60.0, 64.0, 30.0)
    produced = circle(60.0 + dx, 64.0 + dy, radius)
    expected = lens_iou(30.0, radius, math.hypot(dx, dy))
    assert measure(painted(produced), asked).iou == pytest.approx(expected, abs=0.01)


def test_iou_of_nested_and_distant_discs() -> None:
    asked = circle(64.0, 64.0, 40.0)
    assert measure(painted(circle(64.0, 64.0, 20.0)), asked).iou == pytest.approx(0.25, abs=0.01)
    assert measure(painted(circle(20.0, 20.0, 15.0)), circle(100.0, 100.0, 20.0)).iou == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_the_score_does_not_depend_on_how_the_picture_is_turned(index: int, turn: int) -> None:
    drawn, other = draw(2 * index, 32, 0), draw(2 * index + 1, 32, 0)
    image, truth = np.asarray(drawn.image), other.truth
    x, y = truth.centre_xy
    for _ in range(turn % 4):
        image, (x, y) = np.rot90(image), (y, truth.size - x)
    if turn >= 4:
        image, x = image[:, ::-1], truth.size - x
    turned = measure(np.ascontiguousarray(image), replace(truth, centre_xy=(x, y)))
    assert turned.iou == pytest.approx(measure(np.asarray(drawn.image), truth).iou, abs=1e-12)


def test_noise_and_blur_cost_little() -> None:
    rng = np.random.default_rng(0)
    noisy, blurred = [], []
    for drawn in circles():
        pixels = np.asarray(drawn.image) + rng.normal(0, 15, (64, 64, 3))
        noisy.append(measure(np.clip(np.round(pixels), 0, 255).astype(np.uint8), drawn.truth))
        soft = drawn.image.filter(PIL.ImageFilter.GaussianBlur(1))
        blurred.append(measure(np.asarray(soft), drawn.truth))
    assert min(picture.iou for picture in noisy + blurred) > 0.9
    assert summarise(noisy)["color_accuracy"] == 1
    assert summarise(blurred)["color_accuracy"] == 1
    assert summarise(noisy)["color_error"] < 5


def test_wrong_colours_cost_colour_and_not_place() -> None:
    asked = circle(50.0, 70.0, 25.0, "red", "navy")
    swapped = measure(painted(replace(asked, colour_name="navy", background_name="red")), asked)
    assert swapped.iou > 0.99
    assert not swapped.color_correct
    distance = float(np.linalg.norm(np.subtract(rgb("red"), rgb("navy"))))
    assert (swapped.disc_color_error, swapped.background_color_error) == pytest.approx((distance, distance))

    half_right = measure(painted(replace(asked, colour_name="gold")), asked)
    assert half_right.iou > 0.99
    assert half_right.background_color_error == 0
    assert not half_right.color_correct


@pytest.mark.parametrize(
    ("asked", "produced", "correct"),
    [
        ("burly wood", "tan", True),
        ("dark blue", "navy", True),
        ("gray", "grey", True),
        ("gold", "golden rod", False),
        ("red", "crimson", False),
        ("green", "blue", False),
    ],
)
def test_near_synonyms_count_and_other_names_do_not(asked: str, produced: str, correct: bool) -> None:
    truth = circle(64.0, 64.0, 30.0, asked, "white")
    assert measure(painted(replace(truth, colour_name=produced)), truth).color_correct is correct


def test_a_random_name_is_rarely_close_to_another() -> None:
    lab = srgb_to_lab([rgb(name) for name in READABLE_NAMES])
    differences = ciede2000(lab[:, None], lab[None])[np.triu_indices(len(lab), 1)]
    assert (differences <= 10).mean() == pytest.approx(0.032, abs=0.0005)


@pytest.mark.parametrize("contrast", [0, 15])
def test_an_empty_picture_has_no_disc(contrast: int) -> None:
    rng = np.random.default_rng(0)
    pixels = 120 + rng.uniform(-contrast, contrast, (64, 64, 3))
    truth = draw(0, 64, 0).truth
    found = segment(pixels.astype(np.uint8))
    assert not found.disc_HW.any()
    np.testing.assert_array_equal(found.disc_colour, found.background_colour)
    empty = measure(pixels.astype(np.uint8), truth)
    assert empty.iou == 0
    assert not empty.color_correct


def test_a_picture_of_one_named_colour_is_not_correct_even_where_the_other_is_similar() -> None:
    truth = circle(64.0, 64.0, 30.0, "gray", "grey")
    assert not measure(np.full((128, 128, 3), rgb("gray"), np.uint8), truth).color_correct


def test_the_mask_is_what_the_drawing_covers_by_half() -> None:
    for drawn in circles(count=20):
        truth = drawn.truth
        image, colour, background = (
            np.asarray(value, float) for value in (drawn.image, truth.colour, truth.background)
        )
        coverage = (image - background) @ (colour - background) / np.sum((colour - background) ** 2)
        clear = np.abs(coverage - 0.5) > 0.02
        np.testing.assert_array_equal(disc_mask(truth)[clear], coverage[clear] > 0.5)


def test_chance_is_far_below_full_marks() -> None:
    chance = chance_levels(size=32, count=400, seed=0)
    assert chance["circle_iou"] == pytest.approx(0.19, abs=0.04)
    assert chance["color_error"] == pytest.approx(195, abs=15)
    assert chance["color_accuracy"] < 0.02


def test_summaries_are_means() -> None:
    asked = circle(64.0, 64.0, 40.0)
    measured = [measure(painted(asked), asked), measure(painted(circle(64.0, 64.0, 20.0, "gold")), asked)]
    scores = summarise(measured)
    assert scores["circle_iou"] == pytest.approx((1 + 0.25) / 2, abs=0.01)
    assert scores["color_accuracy"] == 0.5
    assert scores["color_error"] == pytest.approx(np.linalg.norm(np.subtract(rgb("red"), rgb("gold"))) / 4)


def test_what_cannot_be_measured_is_refused() -> None:
    truth = draw(0, 64, 0).truth
    with pytest.raises(ValueError, match="float64"):
        measure(np.zeros((64, 64, 3)), truth)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(32, 32, 3\); expected \(64, 64, 3\)"):
        measure(np.zeros((32, 32, 3), np.uint8), truth)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
