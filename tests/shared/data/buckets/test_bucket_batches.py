"""Batches of pictures in their own shapes: which samples, whose pixels, and what Stable Diffusion XL is told."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from shared.config import TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.buckets.picture_sizes import picture_sizes
from shared.data.buckets.shapes import choose_buckets
from shared.data.buckets.source import BucketedSource
from shared.data.decoded_pairs import PairDecoder
from shared.data.sample import RawSample
from shared.data.sources import RandomAccessSource, open_source
from shared.data.tokenization import PromptInputs, XLInputs
from shared.data.views import Placement
from tests.shared.data.pictures import (
    LATENT_SHAPE,
    captions_in,
    config,
    loader,
    png,
    tokenize,
    write_image_folder,
)

SHAPES = [(24, 40), (32, 32), (40, 24)]  # those of 32 pixels
PICTURES = [(48, 80), (70, 64), (80, 50)] * 8
BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of each shape; of one that is wide, the end is missing, and of one the beginning."""
    samples = [
        {"image": png(index, *size), "conditioning_image": png(100 + index, *size), "text": f"{index}"}
        for index, size in enumerate(PICTURES)
    ]
    damaged = {"truncated": samples[2]["image"][:-3000], "headless": b"GIF"}
    samples += [samples[2] | {"image": image, "text": text} for text, image in damaged.items()]
    return write_image_folder(tmp_path_factory.mktemp("data"), samples)


def settings(folder: Path, **values: Any) -> TrainConfig:
    return config(train_data_dir=str(folder), aspect_buckets=3, **values)


def bucketed(training: TrainConfig, least: int = BATCH) -> BucketedSource:
    source = open_source(training)
    assert isinstance(source, RandomAccessSource)
    sizes = picture_sizes(source, threads=1)
    return BucketedSource(source, choose_buckets(sizes, training.resolution, training.aspect_buckets or 0, least))


def shape_of(caption: str) -> tuple[int, int]:
    return SHAPES[int(caption) % 3]


def test_a_batch_has_pictures_of_one_shape_and_arrays_of_its_size(folder: Path) -> None:
    training = settings(folder)
    loading = loader(training, BatchSpec(BATCH), source=bucketed(training))
    assert loading.sizes == SHAPES
    met = Counter[tuple[int, int]]()
    for step in range(12):
        batch, (width, height) = loading.batch(step), loading.size_of(step)
        assert {shape_of(caption) for caption in captions_in(batch)} == {(width, height)}
        assert batch["pixel_values"].shape == (1, BATCH, height, width, 3)
        assert batch["conditioning_pixel_values"].shape == (1, BATCH, height, width, 3)
        assert batch["noise"].shape == batch["vae_noise"].shape == (1, BATCH, height // 8, width // 8, 4)
        blank = loading.blank((width, height))
        assert {name: (array.shape, array.dtype) for name, array in blank.items()} == {
            name: (array.shape, array.dtype) for name, array in batch.items()
        }
        met[width, height] += 1
    assert set(met) == set(SHAPES)


def test_every_sample_once_in_each_pass_and_a_bad_one_replaced_by_one_of_its_shape(folder: Path) -> None:
    """The two bad ones are among the ten of one shape, whose good ones are met in their place."""
    training = settings(folder)
    source = bucketed(training)
    assert source.manifest["aspect_buckets"] == ["24x40: 8", "32x32: 8", "40x24: 10"]
    loading = loader(training, BatchSpec(BATCH), source=source)
    passes, steps = 4, 4 * 26 // BATCH
    seen = Counter(caption for step in range(steps) for caption in captions_in(loading.batch(step)))
    assert loading.skipped == 2
    tall, square, wide = ([seen[f"{index}"] for index in range(place, 24, 3)] for place in range(3))
    assert tall == square == [passes] * 8
    assert min(wide) >= passes
    assert sum(wide) == passes * 10


@pytest.mark.parametrize("workers", [0, 3])
def test_hosts_devices_accumulation_and_a_resume_change_nothing(folder: Path, workers: int) -> None:
    training = settings(folder, random_crop=True, random_flip=True)
    source = bucketed(training)
    through = loader(training, BatchSpec(BATCH), source=source).iterate()
    expected = [next(through)[1] for _ in range(9)]
    spec, parts = BatchSpec(1, 2, 2), []
    for host in range(2):
        threaded = settings(folder, random_crop=True, random_flip=True, dataloader_num_workers=workers)
        loading = loader(threaded, spec, host, 2, source=source)
        resumed = loading.iterate(5)
        parts.append([next(resumed)[1] for _ in range(4)])
        loading.close()
    for step, whole in enumerate(expected[5:]):
        for name, array in whole.items():
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined.reshape(array.shape), array, err_msg=name)


@pytest.mark.parametrize("corner", [None, (0.0, 0.99), (0.7, 0.3)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", SHAPES)
def test_pixels_are_those_of_pil(size: tuple[int, int], flipped: bool, corner: tuple[float, float] | None) -> None:
    """Resized until the shape is covered, mirrored, and cut."""
    content, (width, height) = png(7, 83, 61), size
    sample = RawSample(content, (content,), ("a",), "a pair")
    pair = PairDecoder(config())(sample, Placement(corner, flipped), size=size)
    scale = max(width / 83, height / 61)
    resized = PIL.Image.open(io.BytesIO(content)).resize(
        (max(width, int(83 * scale + 1e-9)), max(height, int(61 * scale + 1e-9))), PIL.Image.Resampling.BILINEAR
    )
    turned = PIL.ImageOps.mirror(resized) if flipped else resized
    spare = (turned.width - width, turned.height - height)
    left, top = (
        (round(spare[0] / 2), round(spare[1] / 2))
        if corner is None
        else (int(corner[0] * (spare[0] + 1)), int(corner[1] * (spare[1] + 1)))
    )
    expected = np.asarray(turned.crop((left, top, left + width, top + height))).astype(int)
    assert np.abs(pair.conditioning_pixels.astype(int) - expected).max() <= 1
    assert pair.pixels is not None
    assert np.abs(pair.pixels.astype(int) - expected).max() <= 1
    assert pair.sizes == (61, 83, top, left, height, width)


@pytest.mark.parametrize("from_data", [False, True])
def test_xl_is_told_the_size_of_the_shape(folder: Path, from_data: bool) -> None:
    training = settings(folder)
    xl = XLInputs(tokenize, None if from_data else (32, 32, 3, 5, 32, 32))
    loading = BatchLoader(
        bucketed(training), training, PromptInputs(tokenize, xl), BatchSpec(BATCH), LATENT_SHAPE, 1000
    )
    for step in range(6):
        batch, (width, height) = loading.batch(step), loading.size_of(step)
        for caption, told in zip(captions_in(batch), batch["time_ids"][0].tolist(), strict=True):
            original_width, original_height = PICTURES[int(caption)]
            assert told[4:] == [height, width]
            assert told[:2] == ([original_height, original_width] if from_data else [height, width])
            if not from_data:
                assert told[2:4] == [3, 5]


def test_a_shape_whose_pictures_are_all_damaged_is_named(tmp_path: Path) -> None:
    sound, damaged = png(0, 64, 64), png(0, 48, 80)[:-3000]
    samples = [{"image": image, "conditioning_image": sound, "text": "a"} for image in [sound] * 4 + [damaged] * 4]
    training = settings(write_image_folder(tmp_path, samples), max_skipped_samples=10)
    loading = loader(training, BatchSpec(BATCH), source=bucketed(training))
    with pytest.raises(ValueError, match=r"none of the training samples of the shape 24x40 can be used \(4 were tried"):
        [loading.batch(step) for step in range(2)]


def test_a_shape_with_less_than_a_batch_is_none(folder: Path) -> None:
    training = settings(folder)
    assert bucketed(training, least=9).counts == {"32x32": 17, "40x24": 9}
