"""A cache made with a stand-in for a backend's encoders, which tells every image: read, continued, refused."""

import dataclasses
import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from shared.config import TrainConfig
from shared.data.cache_record import RECORD_FILE
from shared.data.decoded_pairs import PairDecoder
from shared.data.preprocessing import preprocess
from shared.data.sources import open_source, open_sources
from shared.data.sources.base import latents_of
from shared.data.sources.cached import CAPTIONS, LATENTS
from shared.data.sources.shard_index import SUFFIX
from shared.precomputed_text.precomputing import TextEncoder
from shared.prepare_data.cache import writing
from shared.prepare_data.cache.encoders import Encoders, ImageEncoder
from shared.prepare_data.cache.making import make_cache
from shared.prepare_data.members import CONDITION
from shared.user_errors import UserError
from tests.shared.data.pictures import captions_in, loader, pairs, write_image_folder

DEMO_MODEL = Path(__file__).resolve().parents[4] / "shared" / "demo_model"
FEATURES = int(json.loads((DEMO_MODEL / "text_encoder" / "config.json").read_text())["hidden_size"])
SIDE, ROWS = 32, 3
SHAPE = (SIDE // 8, SIDE // 8, 4)


class Interrupted(BaseException):
    """As if the process had been killed."""


@dataclasses.dataclass
class Backend:
    """The mean is what the image's corner is, the deviation its number in the row; counts what it encodes."""

    mixed_precision: str = "no"
    images: int = 0
    stop_after: int = 10**9

    def open(self, config: TrainConfig) -> Encoders:
        config = dataclasses.replace(config, mixed_precision=self.mixed_precision)  # type: ignore[arg-type]
        return Encoders(config, SHAPE, lambda: ImageEncoder(ROWS, self.encode), lambda: TextEncoder(4, _encode_text))

    def encode(self, pixels: Any) -> tuple[Any, Any]:
        assert pixels.shape == (ROWS, SIDE, SIDE, 3)
        if self.images >= self.stop_after:
            raise Interrupted
        self.images += ROWS
        dtype = np.uint16 if self.mixed_precision == "bf16" else np.float32
        return expected_mean(pixels).astype(dtype), np.ones((ROWS, *SHAPE), dtype)


def expected_mean(pixels: Any) -> Any:
    return np.repeat(pixels[..., ::8, ::8, :1].astype(np.float32), 4, axis=-1)


def _encode_text(token_ids: Any) -> dict[str, Any]:
    rows, length = token_ids["input_ids"].shape
    return {"prompt_embeds": np.zeros((rows, length, FEATURES), np.float32)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("data"), pairs())


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SAMPLES_PER_SHARD", 7)


def config(photos: Path, folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(DEMO_MODEL),
        "train_data_dir": str(photos),
        "resolution": SIDE,
        "output_dir": str(folder),
    }
    return TrainConfig(**(settings | changes))


def of_cache(folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(DEMO_MODEL),
        "cached_data": str(folder),
        "resolution": SIDE,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.usefixtures("small_shards")
def test_batches_are_those_of_the_pictures_but_for_the_latents(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    plain, cached = (loader(made, source=source) for source, made in _both(photos, tmp_path))
    for step in range(5):
        expected, given = plain.batch(step), cached.batch(step)
        np.testing.assert_array_equal(given["latent_mean"], expected_mean(expected.pop("pixel_values")))
        assert given["latent_std"].shape == given.pop("latent_mean").shape
        assert (given.pop("latent_std") == 1).all()
        assert given.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(given[name], array)
        assert captions_in(given) == captions_in(expected)


def _both(photos: Path, cache: Path) -> Any:
    for made in (config(photos, cache), of_cache(cache)):
        yield open_source(made), made


def test_webdataset_reads_the_shards(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    (shard,) = tmp_path.glob("*.tar")
    with shard.open("rb") as stream:
        read = list(group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert [sample["__key__"] for sample in read] == [f"{index:09d}" for index in range(20)]
    assert [json.loads(sample[CAPTIONS])["text"] for sample in read] == [[f"caption {index}"] for index in range(20)]
    assert {tuple(sorted(key for key in sample if key[0] != "_")) for sample in read} == {
        tuple(sorted((LATENTS, CONDITION, CAPTIONS)))
    }


def test_sizes_are_those_of_the_pictures(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    plain, cached = (open_source(made) for _, made in _both(photos, tmp_path))
    for index in range(20):
        expected = PairDecoder(config(photos, tmp_path))(plain[index]).sizes  # type: ignore[index]
        assert cached[index].image.unpack().sizes == expected  # type: ignore[index]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("stop_after", [0, 6, 9, 18])
def test_work_that_was_stopped_goes_on_and_ends_with_the_same_files(
    photos: Path, tmp_path: Path, stop_after: int
) -> None:
    undisturbed, stopped, rest = Backend(), Backend(stop_after=stop_after), Backend()
    make_cache(config(photos, tmp_path / "undisturbed"), "flax", undisturbed.open)
    with pytest.raises(Interrupted):
        make_cache(config(photos, tmp_path / "stopped"), "flax", stopped.open)
    with pytest.raises(UserError, match="is not finished"):
        open_source(of_cache(tmp_path / "stopped"))
    make_cache(config(photos, tmp_path / "stopped"), "flax", rest.open)
    assert _files(tmp_path / "stopped") == _files(tmp_path / "undisturbed")
    assert rest.images <= undisturbed.images - 9 * (stop_after // 9)  # a shard of 7 takes three calls
    assert rest.images > 0


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != SUFFIX
    }


def test_made_once_more_nothing_is_encoded(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    no_models = lambda made: Encoders(made, SHAPE, pytest.fail, pytest.fail)  # noqa: E731
    make_cache(config(photos, tmp_path, mixed_precision="no"), "flax", no_models)
    assert len(open_source(of_cache(tmp_path))) == 20  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_was_deleted_is_made_again_as_the_message_says(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    before = _files(tmp_path)
    (tmp_path / "cache-000001.tar").unlink()
    with pytest.raises(UserError, match="run the command that made it once more"):
        open_source(of_cache(tmp_path))
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    assert _files(tmp_path) == before


def test_bfloat16_comes_as_its_bits_and_text_is_known_to_both_backends(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    make_cache(config(photos, tmp_path), "torch", Backend().open)
    assert len(list((tmp_path / "text").iterdir())) == 1
    half = tmp_path / "half"
    source = Backend("bf16")
    with pytest.raises(AssertionError):  # the stand-in for the text encoder has float32 alone
        make_cache(config(photos, half), "flax", source.open)
    assert json.loads((half / RECORD_FILE).read_text())["stored_dtype"] == "BF16"
    assert len(list(half.glob("*.tar"))) == 1


def test_held_out_samples_keep_their_latents(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    train, held_out = open_sources(of_cache(tmp_path, num_evaluation_samples=4, max_train_samples=8))
    assert held_out is not None
    for source in (train, held_out):
        layout = latents_of(source)
        assert layout is not None
        assert layout.shape == SHAPE


def test_bad_samples_are_left_out_and_counted(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = shutil.copytree(photos, tmp_path / "photos")
    (damaged / "image" / "0003.png").write_bytes(b"no picture")
    caplog.set_level("INFO")
    make_cache(config(damaged, tmp_path / "cache"), "flax", Backend().open)
    assert len(open_source(of_cache(tmp_path / "cache"))) == 19  # type: ignore[arg-type]
    assert "holds 19 samples (1 could not be used)" in caplog.text
    with pytest.raises(UserError, match="more than --max_skipped_samples=0"):
        make_cache(config(damaged, tmp_path / "strict", max_skipped_samples=0), "flax", Backend().open)


def _other_vae(model: Path) -> Path:
    path = model / "vae" / "config.json"
    path.write_text(path.read_text() + "\n")
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 64}, "was made with --resolution 32"),
        ({"image_interpolation_mode": "lanczos"}, "was made with --image_interpolation_mode bilinear"),
        ({"conditioning_interpolation": "nearest"}, "was made with --conditioning_interpolation bilinear"),
        ({"conditioning_channels": (1,)}, "was made with --conditioning_channels 3"),
    ],
)
def test_a_run_of_another_kind_is_refused(photos: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    with pytest.raises(UserError, match=message):
        open_source(of_cache(tmp_path, **changes))


def test_another_vae_is_refused(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path / "cache"), "flax", Backend().open)
    other = _other_vae(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    with pytest.raises(UserError, match="encoded by another VAE"):
        open_source(of_cache(tmp_path / "cache", pretrained_model_name_or_path=str(other)))
    with pytest.raises(UserError, match=r"holds another cache \(vae differ"):
        make_cache(config(photos, tmp_path / "cache", pretrained_model_name_or_path=str(other)), "flax", Backend().open)


def _no_record(cache: Path) -> None:
    (cache / RECORD_FILE).unlink()


def _no_shards(cache: Path) -> None:
    for shard in cache.glob("*.tar"):
        shard.unlink()


def _no_json(cache: Path) -> None:
    (cache / RECORD_FILE).write_text("[")


def _format_of_tomorrow(cache: Path) -> None:
    record = json.loads((cache / RECORD_FILE).read_text())
    (cache / RECORD_FILE).write_text(json.dumps(record | {"format": 2}))


def _other_count(cache: Path) -> None:
    record = json.loads((cache / RECORD_FILE).read_text())
    (cache / RECORD_FILE).write_text(json.dumps(record | {"samples": 21}))


@pytest.mark.parametrize("damage", [_no_record, _no_shards, _no_json, _format_of_tomorrow, _other_count])
def test_a_damaged_cache_is_a_sentence(photos: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    damage(tmp_path)
    with pytest.raises(UserError):
        open_source(of_cache(tmp_path))


def test_damaged_latents_are_a_skipped_sample(photos: Path, tmp_path: Path) -> None:
    make_cache(config(photos, tmp_path), "flax", Backend().open)
    (shard,) = tmp_path.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b"latent_mean") + 400] ^= 1
    shard.write_bytes(content)
    made = of_cache(tmp_path)
    batches = loader(made)
    for step in range(5):
        batches.batch(step)
    assert batches.skipped == 1


def test_a_full_disk_is_a_sentence_and_keeps_what_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    write = webdataset.TarWriter.write
    room = [10]

    def full(self: Any, sample: Any) -> Any:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, sample)

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.*what is written so far is kept"):
        make_cache(config(photos, tmp_path), "flax", Backend().open)
    assert [path.name for path in sorted(tmp_path.glob("*cache-*"))] == ["cache-000000.tar"]


def test_conditions_are_kept_without_loss(photos: Path, tmp_path: Path) -> None:
    grey = shutil.copytree(photos, tmp_path / "photos")
    for path in (grey / "conditioning_image").iterdir():
        PIL.Image.open(path).convert("L").save(path)
    make_cache(config(grey, tmp_path / "cache"), "flax", Backend().open)
    plain, cached = (source for source, _ in _both(grey, tmp_path / "cache"))
    for index in range(20):
        expected, given = (
            preprocess(source[index].conditioning_images[0], SIDE, "bilinear") for source in (plain, cached)
        )
        np.testing.assert_array_equal(given, expected)
        assert PIL.Image.open(_stored_condition(cached, index)).mode == "L"


def _stored_condition(source: Any, index: int) -> Any:
    return io.BytesIO(source[index].conditioning_images[0])
