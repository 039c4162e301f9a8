"""Captions are encoded once, for this run and for later ones; the encoder here is a stand-in that counts its texts."""

import collections
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from shared.config import Backend, TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import open_sources
from shared.data.sources.base import RandomAccessSource, TellsCaptions, captions_at
from shared.data.tokenization import TokenIds
from shared.evaluation.denoising import DenoisingEvaluation, read_samples
from shared.precomputed_text import precomputing
from shared.precomputed_text.precomputing import Processes, TextEncoder
from shared.run.setup import PreparedRun, prepare, with_precomputed_text
from shared.user_errors import UserError
from tests.shared.data.pictures import pairs, write_image_folder, write_prompt_json, write_tars

DEMO_MODEL = Path(__file__).resolve().parents[3] / "shared" / "demo_model"
FEATURES = int(json.loads((DEMO_MODEL / "text_encoder" / "config.json").read_text())["hidden_size"])
ROWS = 5
CIRCLES = 12


class Encoder:
    """A stand-in for a backend's: what it makes of a text tells all of its tokens."""

    def __init__(self, features: int = FEATURES, pooled: int = 0, dtype: Any = np.float32) -> None:
        self.features, self.pooled, self.dtype = features, pooled, dtype
        self.opened, self.texts = 0, 0

    def __call__(self) -> TextEncoder:
        self.opened += 1
        return TextEncoder(ROWS, self.encode)

    def encode(self, token_ids: TokenIds) -> dict[str, np.ndarray]:
        assert {len(ids) for ids in token_ids.values()} == {ROWS}
        self.texts += len(np.unique(token_ids["input_ids"], axis=0))
        return self.expected(token_ids)

    def expected(self, token_ids: TokenIds) -> dict[str, np.ndarray]:
        all_ids = sum(ids.astype(np.float64) * (index + 1) for index, ids in enumerate(token_ids.values()))
        scale = np.linspace(0.5, 1, self.features) / (1 if self.dtype == np.uint16 else 1e5)
        arrays = {"prompt_embeds": (all_ids[:, :, None] * scale).astype(self.dtype)}
        if self.pooled:
            arrays["pooled_prompt_embeds"] = np.repeat(all_ids.sum(axis=1)[:, None], self.pooled, 1).astype(self.dtype)
        return arrays


def config(tmp_path: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(DEMO_MODEL),
        "generated_circles": CIRCLES,
        "resolution": 64,
        "train_batch_size": 2,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "report_to": "none",
        "precompute_text": True,
        "mixed_precision": "no",
    }
    return TrainConfig(**(settings | changes))


def prepared(tmp_path: Path, **changes: Any) -> PreparedRun:
    return prepare(config(tmp_path, **changes), "torch")


def precomputed(run: PreparedRun, encoder: Encoder, backend: Backend = "torch") -> PreparedRun:
    return with_precomputed_text(run, backend, encoder)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "controlnet-trainer" / "text").glob("*/*"))


def check_all(run: PreparedRun, encoder: Encoder, captions: list[str]) -> None:
    ids = run.prompt_inputs.token_ids(captions)
    told = run.prompt_inputs(captions, np.zeros((len(captions), 6), np.float32))
    for name, expected in encoder.expected(ids).items():
        np.testing.assert_array_equal(told[name], expected)
    assert not {"input_ids", "input_ids_2"} & told.keys()


def all_captions(run: PreparedRun) -> list[str]:
    assert isinstance(run.source, RandomAccessSource)
    return [caption for index in range(len(run.source)) for caption in run.source[index].captions]


def test_without_the_flag_nothing_happens(tmp_path: Path) -> None:
    run, encoder = prepared(tmp_path, precompute_text=False), Encoder()
    assert precomputed(run, encoder) is run
    assert encoder.opened == 0
    assert not files(tmp_path)


def test_everything_is_encoded_once_and_found_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All captions, the empty one, validation prompts and held-out samples; in files of two texts here."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "condition.png")
    settings = {
        "validation_image": (str(tmp_path / "condition.png"),),
        "validation_prompt": ("a prompt", "a prompt", "another"),
        "num_evaluation_samples": 3,
    }
    monkeypatch.setattr(precomputing, "_LARGEST_PART", 2 * 77 * FEATURES * 4)
    run, encoder = prepared(tmp_path, **settings), Encoder()
    caplog.set_level("INFO", "shared.precomputed_text")
    ready = precomputed(run, encoder)
    assert run.held_out_source is not None
    captions = ["", "a prompt", "another", *all_captions(run), *(run.held_out_source[i].captions[0] for i in range(3))]
    distinct = len(set(captions))
    assert encoder.opened == 1
    assert encoder.texts == distinct
    assert len(files(tmp_path)) == -(-distinct // 2)
    assert f"of {distinct} captions and prompts" in caplog.text
    assert f"{distinct} of them new, is kept in {tmp_path / 'cache'}" in caplog.text
    check_all(ready, encoder, captions * 2)
    check_all(precomputed(prepared(tmp_path, **settings), forbidden := Encoder()), encoder, captions)
    assert forbidden.opened == 0


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    precomputed(prepared(tmp_path, max_train_samples=4), first)
    run = precomputed(prepared(tmp_path), second)
    assert 0 < second.texts == len({"", *all_captions(run)}) - first.texts
    check_all(run, second, ["", *all_captions(run)])


def test_batches_and_held_out_samples_bring_what_was_encoded(tmp_path: Path) -> None:
    """Dropped captions are the empty one; all else in a batch is as without."""
    changes = {"proportion_empty_prompts": 0.5, "num_evaluation_samples": 2}
    run, encoder = prepared(tmp_path, **changes), Encoder()
    ready = precomputed(run, encoder)

    def loader(run: PreparedRun) -> BatchLoader:
        return BatchLoader(run.source, run.config, run.prompt_inputs, BatchSpec(4, 1, 2), (8, 8, 4), 1000)

    plain, stored = loader(run).batch(1), loader(ready).batch(1)
    assert stored.keys() == plain.keys() - {"input_ids"} | {"prompt_embeds"}
    for name in stored.keys() & plain.keys():
        np.testing.assert_array_equal(stored[name], plain[name])
    ids = plain["input_ids"].reshape(8, 77)
    np.testing.assert_array_equal(
        stored["prompt_embeds"].reshape(8, 77, -1), encoder.expected({"input_ids": ids})["prompt_embeds"]
    )
    empty = run.prompt_inputs([""])["input_ids"][0]
    assert 0 < sum(np.array_equal(row, empty) for row in ids) < 8
    blank = loader(ready).blank()
    assert {name: (array.shape, array.dtype) for name, array in blank.items()} == {
        name: (array.shape, array.dtype) for name, array in stored.items()
    }
    assert run.held_out_source is not None
    samples = read_samples(run.held_out_source, run.config)
    plain, stored = (
        next(DenoisingEvaluation(samples, inputs, 0, 8, (8, 8, 4), 1000).batches())
        for inputs in (run.prompt_inputs, ready.prompt_inputs)
    )
    expected = encoder.expected({"input_ids": plain["input_ids"]})
    np.testing.assert_array_equal(stored["prompt_embeds"], expected["prompt_embeds"])


def test_xl_keeps_two_texts_as_one_and_the_pooled_one(tmp_path: Path, xl_model: Path) -> None:
    run = prepared(tmp_path, pretrained_model_name_or_path=str(xl_model), mixed_precision="bf16")
    encoder = Encoder(96, 48, np.uint16)
    ready = precomputed(run, encoder)
    check_all(ready, encoder, ["", *all_captions(run)])
    told = ready.prompt_inputs.of_whole_images(64, 64)([""])
    assert told.keys() == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
    assert ready.is_xl
    assert ready.prompt_inputs.zeros_for_empty_prompt == run.prompt_inputs.zeros_for_empty_prompt


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "another file"])
def test_what_is_damaged_is_named_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    run, encoder = prepared(tmp_path), Encoder()
    precomputed(run, encoder)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-100] ^= 1
    path.write_bytes({"a bit": changed, "cut": whole[:-1], "empty": b"", "another file": b"x" * 5000}[damage])
    again = Encoder()
    check_all(precomputed(run, again), encoder, ["", *all_captions(run)])
    assert again.texts == encoder.texts
    assert path.read_bytes() == whole
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert path.name in warning


def test_a_start_that_is_interrupted_keeps_whole_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputing, "_LARGEST_PART", 3 * 77 * FEATURES * 4)
    run, encoder = prepared(tmp_path), Encoder()

    def interrupted(token_ids: TokenIds) -> dict[str, np.ndarray]:
        if encoder.texts > 5:
            raise KeyboardInterrupt
        return encoder.encode(token_ids)

    with pytest.raises(KeyboardInterrupt):
        with_precomputed_text(run, "torch", lambda: TextEncoder(ROWS, interrupted))
    assert len(files(tmp_path)) == 2
    again = Encoder()
    check_all(precomputed(run, again), again, ["", *all_captions(run)])
    assert again.texts == len({"", *all_captions(run)}) - 6


def test_what_decides_what_is_encoded_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Another tokenizer has other tokens, and needs none."""
    encoder = Encoder()

    def folders(backend: Backend = "torch", encoder: Encoder = encoder, **changes: Any) -> set[Path]:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        precomputed(prepared(tmp_path, **changes), encoder, backend)
        return {path.parent for path in files(tmp_path)}

    changed = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, changed)
    plain = folders()
    assert folders(pretrained_model_name_or_path=str(changed), seed=3) == plain
    weights = bytearray((changed / "text_encoder" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "text_encoder" / "model.safetensors").write_bytes(weights)
    others = [
        folders(pretrained_model_name_or_path=str(changed)),
        folders("flax"),
        folders(mixed_precision="fp16", encoder=Encoder(dtype=np.float16)),
        folders(allow_tf32=True),
    ]
    assert len({*plain, *(folder for found in others for folder in found)}) == 1 + len(others)


def test_without_a_cache_dir_it_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    precomputed(prepared(tmp_path, cache_dir=None), Encoder())
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_processes_share_the_work(tmp_path: Path, count: int) -> None:
    """Each waits for the others, whichever is slow, and all find everything."""
    barrier = threading.Barrier(count, timeout=60)
    encoders = [Encoder() for _ in range(count)]
    runs = [prepared(tmp_path) for _ in range(count)]

    def process(index: int) -> PreparedRun:
        return with_precomputed_text(runs[index], "torch", encoders[index], Processes(index, count, barrier.wait))

    with ThreadPoolExecutor(count) as pool:
        ready = list(pool.map(process, range(count)))
    captions = ["", *all_captions(runs[0])]
    for run in ready:
        check_all(run, encoders[0], captions)
    assert sum(encoder.texts for encoder in encoders) == len(set(captions))
    assert all(encoder.texts for encoder in encoders)
    assert len(files(tmp_path)) == count


def test_runs_at_the_same_time_harm_each_other_nowhere(tmp_path: Path) -> None:
    """Both encode everything, and the second takes the place of the first's file."""
    runs = [prepared(tmp_path) for _ in range(2)]
    encoders = [Encoder() for _ in range(2)]
    ready: list[PreparedRun] = []

    def other_run_meanwhile() -> TextEncoder:
        ready.append(precomputed(runs[1], encoders[1]))
        return encoders[0]()

    ready.append(with_precomputed_text(runs[0], "torch", other_run_meanwhile))
    assert encoders[0].texts == encoders[1].texts
    assert len(files(tmp_path)) == 1
    for run in ready:
        check_all(run, encoders[0], ["", *all_captions(runs[0])])


def test_a_stream_is_refused_before_any_work(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a", "image": b"", "conditioning_image": b""}]).to_parquet(
        tmp_path / "data.parquet"
    )
    data = {"generated_circles": None, "dataset_name": str(tmp_path), "streaming": True, "max_train_steps": 1}
    with pytest.raises(UserError, match=r"--precompute_text needs data whose captions.*stream.*leave it out"):
        prepared(tmp_path, **data)


def test_room_is_counted_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, encoder = prepared(tmp_path), Encoder()
    needed = len({"", *all_captions(run)}) * (32 + 77 * FEATURES * 4)
    usage = collections.namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match=r"--precompute_text needs 0\.0 GB for \d+ captions.*--cache_dir"):
        precomputed(run, encoder)
    assert encoder.opened == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    precomputed(run, encoder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    precomputed(run, encoder)  # nothing is new


@pytest.mark.parametrize("where", ["folder", "file"])
def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    run = prepared(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "folder":
        monkeypatch.setattr(Path, "mkdir", full)
    else:
        monkeypatch.setattr(precomputing, "write_part", full)
    with pytest.raises(UserError, match=r"^--precompute_text: .*No space left on device.*--cache_dir") as refused:
        precomputed(run, Encoder())
    assert "\n" not in str(refused.value)


def test_captions_that_change_meanwhile_are_named(tmp_path: Path) -> None:
    ready = precomputed(prepared(tmp_path), Encoder())
    with pytest.raises(UserError, match="not among those that were encoded at the start"):
        ready.prompt_inputs(["a caption that nobody had"])


def test_captions_of_bad_samples_are_passed_over(tmp_path: Path) -> None:
    samples = pairs(4)
    samples[1]["text"] = "half of \ud83d"
    folder = write_image_folder(tmp_path / "data", [sample | {"text": sample["text"]} for sample in samples])
    run = prepared(tmp_path, generated_circles=None, train_data_dir=str(folder))
    encoder = Encoder()
    check_all(precomputed(run, encoder), encoder, ["", "caption 0", "caption 2", "caption 3"])
    assert encoder.texts == 4


def _saved(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_list([row | {"text": [row["text"], "x"]} for row in pairs(6)]).save_to_disk(str(folder))
    return {"train_data_dir": str(folder), "load_from_disk": True}


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "circles": lambda folder: {"generated_circles": 6},
    "image folder": lambda folder: {"train_data_dir": str(write_image_folder(folder, pairs(6)))},
    "prompt.json": lambda folder: {"train_data_dir": str(write_prompt_json(folder, pairs(6)))},
    "tars": lambda folder: {"train_shards": (str(write_tars(folder, pairs(6))),)},
    "saved": _saved,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_told_without_the_pictures(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a part of the data, where it is held out or left."""
    data = {"generated_circles": None} | LAYOUTS[layout](tmp_path / "data")
    source, held_out = open_sources(config(tmp_path, num_evaluation_samples=2, **data))
    assert isinstance(source, RandomAccessSource)
    assert held_out is not None
    for part in (source, held_out):
        assert isinstance(part, TellsCaptions)
        expected = [part[index].captions for index in range(len(part))]
        assert [captions_at(part, index) for index in range(len(part))] == expected
        assert all(expected)
