import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageColor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.sources import open_source
from shared.data.sources.circles import CirclesSource, draw
from shared.data.sources.colour_names import READABLE_NAMES, rgb
from tests.shared.data.pictures import config, loader, write_circles_folder


def test_readable_names_are_the_css_colours_with_their_words_apart() -> None:
    assert {name.replace(" ", "") for name in READABLE_NAMES} == set(PIL.ImageColor.colormap)
    assert len(READABLE_NAMES) == len(PIL.ImageColor.colormap)
    assert {"burly wood", "pale golden rod", "old lace", "medium violet red"} <= set(READABLE_NAMES)
    assert rgb("burly wood") == (0xDE, 0xB8, 0x87)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([32, 64, 128]), st.integers(0, 2**32))
def test_pictures_show_their_ground_truth(index: int, size: int, seed: int) -> None:
    drawn = draw(index, size, seed)
    truth, image = drawn.truth, np.asarray(drawn.image).astype(float)
    x, y = truth.centre_xy
    assert truth.radius <= min(x, y, size - x, size - y) + 1e-9
    assert tuple(image[int(y), int(x)]) == truth.colour
    assert np.linalg.norm(np.subtract(truth.colour, truth.background)) >= 120
    assert truth.caption == f"{truth.colour_name} circle with {truth.background_name} background"

    # Area and centre of gravity, measured back from the pixels, in the channel that differs most.
    channel = int(np.argmax(np.abs(np.subtract(truth.colour, truth.background))))
    inside, outside = truth.colour[channel], truth.background[channel]
    coverage = (image[:, :, channel] - outside) / (inside - outside)
    grid = np.arange(size) + 0.5
    assert np.sqrt(coverage.sum() / np.pi) == pytest.approx(truth.radius, abs=0.2)
    assert (coverage.sum(axis=0) @ grid) / coverage.sum() == pytest.approx(x, abs=0.1)
    assert (coverage.sum(axis=1) @ grid) / coverage.sum() == pytest.approx(y, abs=0.1)

    outline = np.asarray(drawn.conditioning_image)[:, :, 0] / 255
    distance = np.hypot(grid[:, None] - y, grid[None] - x)
    assert (distance * outline).sum() / outline.sum() == pytest.approx(truth.radius, abs=0.2)
    assert outline[np.abs(distance - truth.radius) > 2].max(initial=0) == 0
    assert outline[np.abs(distance - truth.radius) < 0.5].min() == 1


def test_circles_are_deterministic_distinct_and_the_same_at_every_size() -> None:
    assert draw(3, 64, 1) == draw(3, 64, 1)
    assert len({draw(index, 16, 1).truth for index in range(50)}) == 50
    assert draw(3, 16, 1).truth != draw(3, 16, 2).truth
    small, large = draw(3, 64, 1).truth, draw(3, 512, 1).truth
    assert small.caption == large.caption
    np.testing.assert_allclose(np.multiply(small.centre_xy, 8), large.centre_xy)


def test_the_source_serves_the_drawings() -> None:
    training = config(generated_circles=5)
    batch = loader(training).batch(0)
    assert batch["pixel_values"].shape == (1, 8, 32, 32, 3)
    expected = {np.asarray(draw(index, 32, training.seed).image).tobytes() for index in range(5)}
    assert {pixels.tobytes() for pixels in batch["pixel_values"][0]} == expected


def test_a_written_folder_holds_the_same_pictures_in_fill50k_layout(tmp_path: Path) -> None:
    write_circles_folder(tmp_path, count=3, size=24, seed=9)
    lines = [json.loads(line) for line in (tmp_path / "prompt.json").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["prompt", "source", "target"]] * 3
    for index, line in enumerate(lines):
        drawn = draw(index, 24, 9)
        assert line["prompt"] == drawn.truth.caption
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / line["target"])), np.asarray(drawn.image))
        np.testing.assert_array_equal(
            np.asarray(PIL.Image.open(tmp_path / line["source"])), np.asarray(drawn.conditioning_image)
        )
    assert open_source(config(train_data_dir=str(tmp_path))).manifest["kind"] == "prompt_json"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="--generated_circles is 0"):
        CirclesSource(0, 32, 0)
    with pytest.raises(ValueError, match="circles of 4 pixels"):
        draw(0, 4, 0)
    with pytest.raises(IndexError):
        CirclesSource(2, 32, 0)[2]
