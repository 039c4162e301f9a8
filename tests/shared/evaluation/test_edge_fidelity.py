import sys

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.evaluation.edges import EdgeAgreement, canny, measure, summarise

SIZE = 40


def textured(seed: int) -> np.ndarray:
    """Smooth random blobs with edges of every strength and direction."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC))


def textbook_canny(image: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny 1986 pixel by pixel: Sobel in the channel that changes most, thinning across the edge, hysteresis."""
    padded = np.pad(image.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    gradients = np.zeros((SIZE, SIZE, 2), int)
    for y, x in np.ndindex(SIZE, SIZE):
        window = padded[y : y + 3, x : x + 3]
        dx = (window[:, 2] - window[:, 0]).T @ [1, 2, 1]
        dy = (window[2] - window[0]).T @ [1, 2, 1]
        channel = np.argmax(np.abs(dx) + np.abs(dy))
        gradients[y, x] = dx[channel], dy[channel]
    strength = np.pad(np.abs(gradients).sum(axis=-1), 1)
    thin = np.zeros((SIZE, SIZE), int)
    for y, x in np.ndindex(SIZE, SIZE):
        dx, dy = gradients[y, x]
        here = strength[y + 1, x + 1]
        sector = round(np.degrees(np.arctan2(dy, dx)) / 45) % 4
        step_y, step_x = [(0, 1), (1, 1), (1, 0), (1, -1)][sector]
        before, after = strength[y + 1 - step_y, x + 1 - step_x], strength[y + 1 + step_y, x + 1 + step_x]
        keeps_ties = sector % 2 == 0
        if here > before and (here > after or (keeps_ties and here == after)):
            thin[y, x] = here
    edges = thin > high
    grown = np.zeros_like(edges)
    while (edges != grown).any():
        grown = edges
        around = np.pad(grown, 1)
        touched = np.any([around[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)], axis=0)
        edges = touched & (thin > low)
    return edges


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_those_of_the_textbook_with_thresholds_100_and_200(seed: int) -> None:
    image = textured(seed)
    found = canny(image)
    assert 50 < np.count_nonzero(found) < 800
    np.testing.assert_array_equal(found, textbook_canny(image, 100, 200))


def test_a_square_has_its_outline_and_a_plain_picture_nothing() -> None:
    image = np.full((SIZE, SIZE, 3), 30, np.uint8)
    assert not canny(image).any()
    image[10:30, 10:30] = 220
    rows, columns = np.nonzero(canny(image))
    assert {int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())} <= {9, 10, 29, 30}
    assert not canny(image)[12:28, 12:28].any()


def as_condition(edges: np.ndarray) -> np.ndarray:
    return np.repeat(edges[:, :, None], 3, axis=-1).astype(np.uint8) * 255


def test_a_picture_with_the_edges_of_its_condition_scores_one() -> None:
    image = textured(0)
    agreement = measure(as_condition(canny(image)), [image])
    assert (agreement.precision, agreement.recall, agreement.f1) == (1, 1, 1)


def test_scores_are_counted_pixel_by_pixel_over_all_pictures_of_a_condition() -> None:
    condition = as_condition(canny(textured(0)))
    images = [textured(0), textured(1), textured(2)]
    asked = np.concatenate([condition[:, :, 0].ravel() > 127] * 3)
    produced = np.concatenate([canny(image).ravel() for image in images])
    pairs = list(zip(produced.tolist(), asked.tolist(), strict=True))
    hits, false_alarms, misses = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
    agreement = measure(condition, images)
    assert agreement.precision == pytest.approx(hits / (hits + false_alarms))
    assert agreement.recall == pytest.approx(hits / (hits + misses))
    assert agreement.f1 == pytest.approx(hits / (hits + (false_alarms + misses) / 2))


def test_edges_displaced_by_two_pixels_do_not_count() -> None:
    image = np.full((SIZE, SIZE, 3), 30, np.uint8)
    image[:, 20:] = 220
    assert measure(as_condition(canny(image)), [np.roll(image, 2, axis=1)[:, :SIZE]]).recall < 0.1


def test_antialiased_conditions_are_cut_in_the_middle() -> None:
    edges = canny(textured(0))
    grey = np.where(as_condition(edges) > 0, 128, 127).astype(np.uint8)
    assert measure(grey, [textured(0)]).f1 == 1


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_f1_is_the_harmonic_mean(both: int, only_produced: int, only_asked: int) -> None:
    agreement = EdgeAgreement(both, both + only_produced, both + only_asked)
    precision, recall = agreement.precision, agreement.recall
    harmonic = 2 * precision * recall / (precision + recall) if both else 0
    assert agreement.f1 == pytest.approx(harmonic)


def test_no_edges_anywhere_score_zero() -> None:
    plain = np.zeros((SIZE, SIZE, 3), np.uint8)
    agreement = measure(plain, [plain])
    assert (agreement.precision, agreement.recall, agreement.f1) == (0, 0, 0)


def test_summaries_average_conditions_not_pixels() -> None:
    large, small = EdgeAgreement(100, 100, 100), EdgeAgreement(0, 10, 10)
    assert summarise([large, small]) == {"edge_precision": 0.5, "edge_recall": 0.5, "edge_f1": 0.5}


def test_without_opencv_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        canny(textured(0))


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    condition = np.zeros((SIZE, SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one"):
        measure(condition, [])
    with pytest.raises(ValueError, match=r"\(20, 40, 3\); expected its condition's, \(40, 40, 3\)"):
        measure(condition, [condition[:20]])
    with pytest.raises(ValueError, match="float64"):
        measure(condition.astype(float), [condition])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
