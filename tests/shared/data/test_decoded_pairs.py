"""An image and its condition: cut from the same place, whatever is drawn and however large either is."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.batches import BatchLoader, BatchSpec
from shared.data.decoded_pairs import PairDecoder
from shared.data.preprocessing import preprocess
from shared.data.sample import BadSampleError, RawSample
from shared.data.sources import open_source
from shared.data.tokenization import PromptInputs, XLInputs
from shared.data.views import Placement
from shared.evaluation.denoising import read_samples
from tests.shared.data.pictures import LATENT_SHAPE, config, loader, pairs, png, tokenize, write_tars

R = 32


def encoded(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def places(width: int, height: int) -> bytes:
    """A picture whose red says how far to the right a pixel lies, whose green how far down."""
    x_W, y_H = (np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = x_W[None], y_H[:, None]
    return encoded(np.round(pixels).astype(np.uint8))


class Pairs:
    """Samples in memory: images and conditions of given sizes."""

    manifest: ClassVar[dict[str, Any]] = {"location": "memory"}

    def __init__(self, sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> None:
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> RawSample:
        image, condition = self._sizes[index]
        return RawSample(places(*image), (places(*condition),), ("a",), f"pair {index}")


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(R, 120), st.integers(R, 120)),
    factor=st.sampled_from([1, 2, 3]),
    corner=st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    flipped=st.booleans(),
)
def test_image_and_condition_show_the_same_place(
    size: tuple[int, int], factor: int, corner: tuple[float, float] | None, flipped: bool
) -> None:
    sample = RawSample(places(*size), (places(size[0] * factor, size[1] * factor),), ("a",), "a pair")
    pair = PairDecoder(config(resolution=R))(sample, Placement(corner, flipped))
    # At the borders of the whole picture, a coarser one is blurred by half of its pixel.
    difference = np.abs(pair.pixels.astype(int) - pair.conditioning_pixels)
    assert difference.max() <= 255 / R
    assert (pair.pixels[0, 0, 0] > pair.pixels[0, -1, 0]) == flipped


def test_flips_and_crops_are_drawn_for_the_position_and_for_both_pictures(tmp_path: Path) -> None:
    source = {"train_shards": (str(write_tars(tmp_path, pairs())),)}
    plain, flipped = (loader(config(**source, random_flip=flip), BatchSpec(20)).batch(2) for flip in (False, True))
    mirrored = []
    for row in range(20):
        names = ("pixel_values", "conditioning_pixel_values")
        is_same, is_mirrored = (
            all(np.array_equal(flipped[name][0, row], plain[name][0, row][:, ::step]) for name in names)
            for step in (1, -1)
        )
        assert is_same != is_mirrored  # as many columns are cut off to the left as to the right
        mirrored.append(is_mirrored)
    assert 3 <= sum(mirrored) <= 17
    for name in ("noise", "vae_noise", "timesteps", "input_ids"):
        np.testing.assert_array_equal(plain[name], flipped[name])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_and_workers_draw_the_same_places(tmp_path: Path, hosts: int, workers: int) -> None:
    settings_ = config(
        train_shards=(str(write_tars(tmp_path, pairs())),),
        random_crop=True,
        random_flip=True,
        dataloader_num_workers=workers,
    )
    expected = loader(config(**vars(settings_) | {"dataloader_num_workers": 0}), BatchSpec(8, 2)).batch(3)
    parts = []
    for host in range(hosts):
        loading = loader(settings_, BatchSpec(8, 2), host, hosts)
        parts.append(next(loading.iterate(3))[1])
        loading.close()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), array)


def test_random_places_differ_from_visit_to_visit_and_from_seed_to_seed() -> None:
    source = Pairs([((96, 32), (96, 32))])
    rows = loader(config(random_crop=True), BatchSpec(12), source=source).batch(0)["pixel_values"][0]
    assert len({row.tobytes() for row in rows}) > 6
    other = loader(config(random_crop=True, seed=8), BatchSpec(12), source=source).batch(0)["pixel_values"][0]
    assert not np.array_equal(rows, other)


def test_xl_is_told_the_corner_of_the_picture_that_it_sees() -> None:
    training = config(random_crop=True, random_flip=True)
    own = PromptInputs(tokenize, XLInputs(tokenize, None))
    source = Pairs([((80, 40), (40, 20)), ((48, 96), (48, 96))])
    batch = BatchLoader(source, training, own, BatchSpec(24), LATENT_SHAPE, 1000).batch(0)
    seen = set()
    for pixels, (height, width, top, left, *target) in zip(
        batch["pixel_values"][0], batch["time_ids"][0].astype(int), strict=True
    ):
        assert target == [R, R]
        is_flipped = bool(pixels[0, 0, 0] > pixels[0, -1, 0])
        whole = PIL.Image.open(io.BytesIO(places(width, height)))
        resized = np.asarray(whole.resize((width * R // min(width, height), height * R // min(width, height)), 2))
        upright_or_not = resized[:, ::-1] if is_flipped else resized
        np.testing.assert_array_equal(pixels, upright_or_not[top : top + R, left : left + R])
        seen.add((is_flipped, top > 0, left > 0))
    assert {flipped for flipped, _, _ in seen} == {False, True}
    assert len(seen) >= 4


def test_evaluation_draws_nothing() -> None:
    samples = [
        read_samples(Pairs([((80, 40), (40, 20))]), config(random_crop=drawn, random_flip=drawn))
        for drawn in (False, True)
    ]
    np.testing.assert_array_equal(samples[0][0].pixels, samples[1][0].pixels)
    np.testing.assert_array_equal(samples[0][0].conditioning_pixels, samples[1][0].conditioning_pixels)


# Channels and filters of the condition


def test_a_grey_condition_has_one_channel() -> None:
    sample = RawSample(png(0, 40, 40), (png(1, 40, 40),), ("a",), "a pair")
    pair = PairDecoder(config(conditioning_channels=(1,)))(sample)
    grey = PIL.Image.open(io.BytesIO(png(1, 40, 40))).convert("L").resize((R, R), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pair.conditioning_pixels, np.asarray(grey)[:, :, None])
    assert pair.pixels.shape == (R, R, 3)
    batch = loader(config(generated_circles=4, conditioning_channels=(1,)), BatchSpec(4)).batch(0)
    assert batch["conditioning_pixel_values"].shape == (1, 4, R, R, 1)


def test_16_bit_depth_maps_keep_their_order_in_one_channel() -> None:
    depth = np.linspace(0, 65535, R, dtype=np.uint16)[None].repeat(R, axis=0)
    sample = RawSample(png(0, R, R), (encoded(depth),), ("a",), "a pair")  # type: ignore[arg-type]
    pair = PairDecoder(config(conditioning_channels=(1,)))(sample)
    np.testing.assert_array_equal(pair.conditioning_pixels[0, :, 0], np.round(depth[0] / 257))


def test_nearest_keeps_the_labels_of_a_map_and_leaves_the_image_smooth() -> None:
    labels = np.random.default_rng(0).choice(np.uint8([0, 90, 200]), (50, 50))
    sample = RawSample(png(0, 50, 50), (encoded(labels),), ("a",), "a pair")
    nearest, smooth = (
        PairDecoder(config(conditioning_channels=(1,), conditioning_interpolation=mode))(sample)
        for mode in ("nearest", None)
    )
    assert set(np.unique(nearest.conditioning_pixels)) == {0, 90, 200}
    assert len(np.unique(smooth.conditioning_pixels)) > 3
    np.testing.assert_array_equal(nearest.pixels, smooth.pixels)


# Pairs of two shapes

MISMATCHED = [((80, 40), (40, 40)), ((64, 64), (64, 64))]


def test_pairs_of_two_shapes_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    loading = loader(config(), BatchSpec(8), source=Pairs(MISMATCHED))
    for step in range(3):
        loading.batch(step)
    loading.close()
    assert loading.skipped == loading.mismatched == 1
    assert caplog.text.count("pair 0") == 1
    assert "its image has 80x40 pixels and its condition 40x40, which are different shapes" in caplog.text
    assert "1 pairs had an image and a condition of different shapes: --mismatched_pairs skip" in caplog.text


def test_too_many_of_them_stop_the_run_and_tell_of_the_flag() -> None:
    with pytest.raises(ValueError, match=r"pair 0: .*, or raise --max_skipped_samples; .*--mismatched_pairs resize"):
        loader(config(max_skipped_samples=0), source=Pairs(MISMATCHED[:1])).batch(0)


def test_other_faults_do_not_speak_of_shapes() -> None:
    class Broken(Pairs):
        def __getitem__(self, index: int) -> RawSample:
            return RawSample(b"", (b"",), ("a",), "broken")

    with pytest.raises(ValueError, match=r"or raise --max_skipped_samples$"):
        loader(config(max_skipped_samples=0), source=Broken(MISMATCHED[:1])).batch(0)


def test_resizing_stretches_the_condition_over_its_image() -> None:
    """As where an annotator rounded sides to multiples of 64: then image and condition show the same again."""
    pair = PairDecoder(config(mismatched_pairs="resize"))(Pairs(MISMATCHED)[0])
    stretched = PIL.Image.open(io.BytesIO(places(40, 40))).resize((64, 32), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pair.conditioning_pixels, np.asarray(stretched.crop((16, 0, 48, 32))))
    assert np.abs(pair.pixels.astype(int) - pair.conditioning_pixels).max() <= 255 / R


def test_cropping_treats_either_by_itself_as_diffusers_does() -> None:
    sample = Pairs(MISMATCHED)[0]
    pair = PairDecoder(config(mismatched_pairs="crop"))(sample)
    for pixels, picture in ((pair.pixels, sample.image), (pair.conditioning_pixels, sample.conditioning_images[0])):
        assert picture is not None
        np.testing.assert_array_equal(pixels, preprocess(picture, R, "bilinear"))


@pytest.mark.parametrize("how", ["resize", "crop"])
@pytest.mark.parametrize("workers", [0, 3])
def test_many_of_them_are_counted_and_a_few_are_named(how: str, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    source = Pairs([((80, 40), (40, 40))] * 30)
    loading = loader(config(mismatched_pairs=how, dataloader_num_workers=workers), BatchSpec(30), source=source)
    with caplog.at_level(logging.WARNING):
        for _, _ in zip(range(3), loading.iterate(), strict=False):
            pass
        loading.close()
    assert loading.skipped == 0
    assert loading.mismatched == 30
    named = [record.getMessage() for record in caplog.records if "80x40" in record.getMessage()]
    assert len(named) == len(set(named)) == 5
    assert f"30 pairs had an image and a condition of different shapes: --mismatched_pairs {how}" in caplog.text


def test_turned_upright_first() -> None:
    """A camera that was turned stores the picture on its side; what was made of it usually stands."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(png(0, 60, 40))).save(file, "PNG", exif=exif.tobytes())
    decode = PairDecoder(config())
    decode(RawSample(file.getvalue(), (png(1, 40, 60),), ("a",), "upright"))
    with pytest.raises(BadSampleError, match="its image has 40x60 pixels and its condition 60x40"):
        decode(RawSample(file.getvalue(), (png(1, 60, 40),), ("a",), "on its side"))


def test_flags_of_places_change_no_other_number() -> None:
    """So that a run with centre crops is the one that it was before they could be random."""
    plain = loader(config(generated_circles=6)).batch(0)
    drawn = loader(config(generated_circles=6, random_crop=True)).batch(0)  # of squares, the only crop is the whole
    for name, array in plain.items():
        np.testing.assert_array_equal(array, drawn[name])
    assert len(open_source(config(generated_circles=6))) == 6  # type: ignore[arg-type]
