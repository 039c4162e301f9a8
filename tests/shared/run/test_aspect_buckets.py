"""A run's pictures put into buckets: looked at once, told in log and record, and refused where that cannot be."""

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.checkpoints.policy import check_resumable
from shared.config import TrainConfig, validate
from shared.data.buckets.kept_sizes import KEPT_SIZES, keep_sizes, read_kept_sizes
from shared.data.buckets.source import BucketedSource
from shared.data.sources import open_source
from shared.precomputed_text.precomputing import Processes
from shared.run.aspect_buckets import check_same_buckets, digest_of_buckets, with_aspect_buckets
from shared.run.setup import PreparedRun, announce, plan_steps, prepare
from tests.shared.data.pictures import png, write_image_folder, write_tars

DEMO_MODEL = Path(__file__).resolve().parents[3] / "shared" / "demo_model"
SAMPLES = [
    {"image": png(index, *size), "conditioning_image": png(99, 8, 8), "text": "a"}
    for index, size in enumerate([(48, 80), (64, 64), (64, 64), (80, 48)] * 2)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "data", SAMPLES)


def config(data: Path, **values: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(DEMO_MODEL),
        "train_data_dir": str(data),
        "resolution": 64,
        "train_batch_size": 2,
        "aspect_buckets": 3,
        "output_dir": str(data.parent / "run"),
        "report_to": "none",
    }
    return TrainConfig(**(settings | values))


def prepared(data: Path, **values: Any) -> PreparedRun:
    return prepare(config(data, **values), "torch")


def counts(run: PreparedRun) -> dict[str, int]:
    assert isinstance(run.source, BucketedSource)
    return run.source.counts


def test_without_the_flag_nothing_happens(data: Path) -> None:
    run = prepared(data, aspect_buckets=None)
    assert with_aspect_buckets(run, 1) is run
    assert not (run.output_dir / KEPT_SIZES).exists()


def test_the_log_and_the_record_tell_of_buckets(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = with_aspect_buckets(prepared(data), 1)
    assert counts(run) == {"48x80": 2, "64x64": 4, "80x48": 2}
    with caplog.at_level(logging.INFO, "shared.run.setup"):
        announce("T", run, plan_steps(run, 1), devices="", parameters=0, precision="")
    assert "3: 48x80 (2 examples), 64x64 (4 examples), 80x48 (2 examples)" in caplog.text
    # As many devices as fill a batch with more than a shape has: its pictures go to the next.
    assert counts(with_aspect_buckets(run, 2)) == {"64x64": 8}


def test_a_run_that_goes_on_looks_at_no_picture_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = with_aspect_buckets(prepared(data), 1)
    shutil.rmtree(data / "image")
    after = with_aspect_buckets(prepared(data), 1)
    assert counts(after) == counts(before)
    assert plan_steps(after, 1).record == plan_steps(before, 1).record


def test_other_data_are_looked_at(data: Path, tmp_path: Path) -> None:
    with_aspect_buckets(prepared(data), 1)
    other = write_image_folder(tmp_path / "other", SAMPLES[:4] + [SAMPLES[3] | {"text": "b"}] * 4)
    assert counts(with_aspect_buckets(prepared(other), 1)) == {"64x64": 3, "80x48": 5}


def test_a_resume_with_other_buckets_is_refused_by_name(data: Path) -> None:
    run = with_aspect_buckets(prepared(data), 1)
    saved = plan_steps(run, 1).record
    other = with_aspect_buckets(prepared(data, aspect_buckets=1), 1)
    with pytest.raises(
        ValueError, match=r"--aspect_buckets: '?3'? in the checkpoint, '?1'? now\n  data aspect_buckets"
    ):
        check_resumable(run.output_dir / "checkpoint-3", saved, plan_steps(other, 1).record)


def test_one_process_of_a_host_looks_at_the_pictures(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, looked, found = threading.Barrier(2), [], {}
    from shared.run import aspect_buckets

    look = aspect_buckets.picture_sizes
    monkeypatch.setattr(
        aspect_buckets,
        "picture_sizes",
        lambda *arguments: looked.append(threading.current_thread().name) or look(*arguments),
    )
    run = prepared(data)

    def process(index: int) -> None:
        found[index] = counts(with_aspect_buckets(run, 1, Processes(index, 2, waiting.wait)))

    threads = [threading.Thread(target=process, args=(index,), name=f"{index}") for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert looked == ["0"]
    assert found[0] == found[1] == {"48x80": 2, "64x64": 4, "80x48": 2}


def test_hosts_that_see_other_pictures_are_told(data: Path) -> None:
    """Of as many in each bucket too."""
    plain, run = prepared(data), with_aspect_buckets(prepared(data), 1)
    assert digest_of_buckets(plain.source) is None
    check_same_buckets([digest_of_buckets(plain.source)] * 3)
    digest = digest_of_buckets(run.source)
    check_same_buckets([digest, digest_of_buckets(with_aspect_buckets(plain, 1).source)])
    for name, other in (("0000", "0001"), ("0001", "0000")):
        (data / "image" / f"{name}.png").write_bytes(SAMPLES[int(other)]["image"])
    (run.output_dir / KEPT_SIZES).unlink()
    other_run = with_aspect_buckets(plain, 1)
    assert counts(other_run) == counts(run)
    with pytest.raises(ValueError, match="The hosts of this run found pictures of different sizes"):
        check_same_buckets([digest, digest_of_buckets(other_run.source)])


def test_sizes_that_cannot_be_kept_cost_the_next_start_and_not_this_one(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepared(data)
    (run.output_dir / KEPT_SIZES).mkdir()  # nothing can take its place
    assert counts(with_aspect_buckets(run, 1)) == {"48x80": 2, "64x64": 4, "80x48": 2}
    assert "picture_sizes cannot be written" in caplog.text


def test_what_tells_no_size_is_counted(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "image" / "0000.png").write_bytes(b"no picture")
    assert counts(with_aspect_buckets(prepared(data), 1)) == {"64x64": 6, "80x48": 2}
    assert "1 of 8 pictures do not tell their sizes" in caplog.text


# --- the file that is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content + b"\0", lambda _: b"", bytes.swapcase]
)
def test_a_damaged_file_is_made_anew(damage: Any, tmp_path: Path) -> None:
    manifest = {"location": "here", "fingerprint": "a", "samples": 3}
    sizes = np.array([[1, 2], [0, 0], [70_000, 5]], np.int32)
    keep_sizes(tmp_path, manifest, sizes)
    for moved in (manifest, manifest | {"location": "there"}):
        np.testing.assert_array_equal(read_kept_sizes(tmp_path, moved, 3), sizes)
    for other in (manifest | {"fingerprint": "b"}, manifest | {"fingerprint": None}):
        assert read_kept_sizes(tmp_path, other, 3) is None
    file = tmp_path / KEPT_SIZES
    file.write_bytes(damage(file.read_bytes()))
    assert read_kept_sizes(tmp_path, manifest, 3) is None


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / KEPT_SIZES)
    assert read_kept_sizes(tmp_path, {"location": "here", "fingerprint": "a"}, 3) is None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"streaming": True, "max_train_steps": 3}, "--streaming learns one by one"),
        ({"train_data_dir": None, "cached_data": "cache"}, "--cached_data, which holds squares"),
        ({"aspect_buckets": 0}, "--aspect_buckets must be in the range from 1 to 64"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(data: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(config(data, **values), "flax")


def test_streams_of_shards_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    shards = write_tars(tmp_path, SAMPLES)
    (tmp_path / "train-000.tar").rename(tmp_path / "train-000.tar.gz")
    with pytest.raises(ValueError, match="--aspect_buckets groups pictures by their shapes, so it needs data"):
        open_source(config(tmp_path, train_data_dir=None, train_shards=(f"{shards}.gz",)))
