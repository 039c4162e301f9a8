"""A global batch depends on the data, the seed and the step, and on nothing about how it is computed."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sample import RawSample
from shared.data.sources import open_source
from shared.data.tokenization import PromptInputs
from tests.shared.data.pictures import LATENT_SHAPE, captions_in, config, loader, pairs, png, tokenize, write_tars

CIRCLES = {"generated_circles": 10, "resolution": 16}


def whole(batch: dict[str, Any]) -> dict[str, Any]:
    """Accumulation and row axes merged into the global batch's one."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 10**6),
    accumulation=st.sampled_from([1, 2, 4]),
    hosts=st.sampled_from([1, 2, 4]),
    devices_per_host=st.sampled_from([1, 2]),
    workers=st.sampled_from([0, 1, 3]),
)
def test_the_global_batch_is_invariant(
    step: int, accumulation: int, hosts: int, devices_per_host: int, workers: int
) -> None:
    expected = loader(config(**CIRCLES), BatchSpec(32)).batch(step)
    devices = hosts * devices_per_host
    spec = BatchSpec(32 // (devices * accumulation), devices, accumulation)
    parts = []
    for host in range(hosts):
        loading = loader(config(**CIRCLES, dataloader_num_workers=workers), spec, host, hosts)
        got_step, part = next(loading.iterate(step))
        loading.close()
        assert got_step == step
        parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in expected}
    for name, array in whole(joined).items():
        np.testing.assert_array_equal(array, whole(expected)[name], err_msg=name)


def test_arrays_have_the_promised_shapes_and_types() -> None:
    batch = loader(config(**CIRCLES), BatchSpec(2, devices=2, accumulation_steps=3)).batch(2)
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert shapes == {
        "pixel_values": ((3, 4, 16, 16, 3), "uint8"),
        "conditioning_pixel_values": ((3, 4, 16, 16, 3), "uint8"),
        "input_ids": ((3, 4, 77), "int32"),
        "vae_noise": ((3, 4, *LATENT_SHAPE), "float32"),
        "noise": ((3, 4, *LATENT_SHAPE), "float32"),
        "timesteps": ((3, 4), "int32"),
        "position": ((3, 4), "int64"),
    }
    np.testing.assert_array_equal(batch["position"].ravel(), np.arange(24, 36))


def test_every_sample_is_seen_once_per_epoch_and_epochs_differ() -> None:
    loading = loader(config(**CIRCLES), BatchSpec(4))  # 10 circles: epochs end in the middle of batches
    rows = [pixels.tobytes() for step in range(10) for pixels in loading.batch(step)["pixel_values"][0]]
    epochs = [rows[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_order_and_noise() -> None:
    one, other = (loader(config(**CIRCLES | {"seed": seed})).batch(0) for seed in (1, 2))
    for name in ("pixel_values", "noise", "vae_noise", "timesteps"):
        assert not np.array_equal(one[name], other[name])


def test_noise_is_standard_normal_and_timesteps_uniform() -> None:
    batch = loader(config(**CIRCLES | {"resolution": 8}), BatchSpec(2000)).batch(0)
    for name in ("noise", "vae_noise"):
        assert abs(batch[name].mean()) < 0.02
        assert abs(batch[name].std() - 1) < 0.02
    assert abs(np.corrcoef(batch["noise"].ravel(), batch["vae_noise"].ravel())[0, 1]) < 0.02
    counts, _ = np.histogram(batch["timesteps"], bins=10, range=(0, 1000))
    assert counts.sum() == 2000
    assert np.abs(counts - 200).max() < 70


class ManyCaptions:
    """Two pictures with three captions each."""

    manifest: ClassVar[dict[str, Any]] = {"location": "memory"}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> RawSample:
        captions = tuple(f"picture {index} caption {choice}" for choice in range(3))
        return RawSample(png(index, 8, 8), (png(index, 8, 8),), captions, str(index))


def test_captions_are_drawn_per_visit_and_dropped_in_proportion() -> None:
    training = config(resolution=8, proportion_empty_prompts=0.25)
    captions = captions_in(loader(training, BatchSpec(600), source=ManyCaptions()).batch(0))
    assert 100 <= captions.count("") <= 200
    for index in range(2):
        for choice in range(3):
            assert 40 <= captions.count(f"picture {index} caption {choice}") <= 110


def test_dropping_captions_changes_nothing_else() -> None:
    kept, dropped = (
        loader(config(resolution=8, proportion_empty_prompts=proportion), source=ManyCaptions()).batch(3)
        for proportion in (0.0, 1.0)
    )
    assert captions_in(dropped) == [""] * 8
    for name in kept.keys() - {"input_ids"}:
        np.testing.assert_array_equal(kept[name], dropped[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_from_a_step_is_the_same_as_asking_for_it(workers: int) -> None:
    loading = loader(config(**CIRCLES, dataloader_num_workers=workers))
    for expected_step, (step, batch) in zip(range(3, 8), loading.iterate(3), strict=False):
        assert step == expected_step
        np.testing.assert_array_equal(batch["pixel_values"], loading.batch(step)["pixel_values"])
    loading.close()


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    loading = loader(config(**CIRCLES, dataloader_num_workers=3))
    next(iter(loading))
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    assert all(thread.daemon for thread in workers)
    loading.close()
    for thread in workers:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in workers)
    with pytest.raises(ValueError, match="this loader was closed"):
        next(iter(loading))


class Broken:
    manifest: ClassVar[dict[str, Any]] = {"location": "memory"}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> RawSample:
        raise RuntimeError("the disk fell off")


class BrokenStream:
    manifest: ClassVar[dict[str, Any]] = {"location": "memory"}

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        yield RawSample(png(0, 8, 8), (png(0, 8, 8),), ("a",), "0")
        raise RuntimeError("the disk fell off")


@pytest.mark.parametrize("source", [Broken(), BrokenStream()])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_thread_reaches_the_consumer(source: Any, workers: int) -> None:
    loading = loader(config(resolution=8, dataloader_num_workers=workers), source=source)
    with pytest.raises(RuntimeError, match="the disk fell off"):
        next(iter(loading))
    loading.close()


class Numbered:
    """Sixty-four samples, whose captions are their numbers."""

    manifest: ClassVar[dict[str, Any]] = {"location": "memory"}

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> RawSample:
        return RawSample(png(0, 8, 8), (png(0, 8, 8),), (str(index),), str(index))


def tokenized_by(function: Callable[[Sequence[str]], npt.NDArray[np.int32]], workers: int) -> BatchLoader:
    training = config(resolution=8, dataloader_num_workers=workers)
    return BatchLoader(Numbered(), training, PromptInputs(function), BatchSpec(8), LATENT_SHAPE, 1000)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_whoever_asks_for_a_batch_has_nothing_left_to_do_where_there_are_threads(workers: int) -> None:
    where: set[threading.Thread] = set()

    def noted(captions: Sequence[str]) -> npt.NDArray[np.int32]:
        where.add(threading.current_thread())
        return tokenize(captions)

    loading = tokenized_by(noted, workers)
    for _ in zip(range(4), loading, strict=False):
        pass
    loading.close()
    assert where
    assert (threading.current_thread() in where) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_goes_wrong_with_a_caption_is_heard_of_at_its_batch(workers: int) -> None:
    plain = tokenized_by(tokenize, 0)
    batches = [plain.batch(step) for step in range(3)]
    unwanted = captions_in(batches[2])[5]

    def refused(captions: Sequence[str]) -> npt.NDArray[np.int32]:
        if unwanted in captions:
            raise ValueError("that one")
        return tokenize(captions)

    loading = tokenized_by(refused, workers)
    reading = loading.iterate()
    for expected in batches[:2]:
        np.testing.assert_array_equal(next(reading)[1]["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="that one"):
        next(reading)
    loading.close()


def test_threads_and_tars_together_give_what_one_thread_gives(tmp_path: Path) -> None:
    shards = (str(write_tars(tmp_path, pairs())),)
    alone, together = (loader(config(train_shards=shards, dataloader_num_workers=count)) for count in (0, 4))
    for (_, one), (_, other) in zip(alone.iterate(), (next(it) for it in [together.iterate()] * 6), strict=False):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    together.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((0, 1, 1), "per_device is 0; expected at least 1"),
        ((8, -1, 1), "devices is -1; expected at least 1"),
        ((8, 1, 0), "accumulation_steps is 0; expected at least 1"),
    ],
)
def test_impossible_counts_are_named(spec: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSpec(*spec)


def test_a_step_is_made_of_every_image_on_every_device() -> None:
    spec = BatchSpec(per_device=2, devices=4, accumulation_steps=3)
    assert spec.global_batch_size == len(np.ravel(np.empty((3, 4, 2))))
    assert str(spec) == "24 images per step = 2 per device × 4 devices × 3 accumulated"


def test_hosts_that_cannot_share_a_batch_are_named() -> None:
    with pytest.raises(ValueError, match="8 rows on 2 devices cannot be shared by 4 hosts"):
        loader(config(**CIRCLES), BatchSpec(4, 2), 0, 4)


def test_two_hosts_hold_disjoint_rows() -> None:
    spec = BatchSpec(2, 2, 2)
    first, second = (loader(config(**CIRCLES), spec, host, 2).batch(1)["position"] for host in range(2))
    np.testing.assert_array_equal(first, [[8, 9], [12, 13]])
    np.testing.assert_array_equal(second, [[10, 11], [14, 15]])
    assert len(open_source(config(**CIRCLES))) == 10  # type: ignore[arg-type]
