"""Samples held out for evaluation are never trained on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.data.sources import RandomAccessSource, open_sources
from shared.data.sources.circles import draw

CONFIG = TrainConfig(pretrained_model_name_or_path="base", generated_circles=30, resolution=16)


@given(count=st.integers(1, 29), seed=st.integers(0, 1000))
def test_every_sample_is_on_one_side(count: int, seed: int) -> None:
    train, held_out = open_sources(dataclasses.replace(CONFIG, num_evaluation_samples=count, seed=seed))
    assert isinstance(train, RandomAccessSource)
    assert held_out is not None
    assert len(train) == train.manifest["samples"] == 30 - count
    names = [[source[index].name for index in range(len(source))] for source in (train, held_out)]
    assert sorted(names[0] + names[1]) == sorted(f"circle {index}" for index in range(30))


def test_the_indices_lead_back_to_the_samples() -> None:
    _, held_out = open_sources(dataclasses.replace(CONFIG, num_evaluation_samples=4))
    assert held_out is not None
    for position, index in enumerate(held_out.indices):
        np.testing.assert_array_equal(np.asarray(held_out[position].image), np.asarray(draw(int(index), 16, 0).image))


def test_a_training_subset_avoids_what_is_held_out() -> None:
    config = dataclasses.replace(CONFIG, num_evaluation_samples=10, max_train_samples=15)
    train, held_out = open_sources(config)
    assert isinstance(train, RandomAccessSource)
    assert held_out is not None
    trained = {train[index].name for index in range(len(train))}
    assert len(trained) == 15
    assert not trained & {held_out[index].name for index in range(len(held_out))}


def test_holding_out_is_part_of_what_identifies_the_data() -> None:
    manifests = [
        open_sources(dataclasses.replace(CONFIG, num_evaluation_samples=count))[0].manifest for count in (0, 4)
    ]
    assert manifests[0] != manifests[1]


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"--num_evaluation_samples is 30, but there are 30 samples"):
        open_sources(dataclasses.replace(CONFIG, num_evaluation_samples=30))


def test_a_stream_cannot_hold_out(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "one.tar")) as writer:
        writer.write({"__key__": "0", "png": b"", "cond.png": b"", "txt": "a circle"})
    config = dataclasses.replace(
        CONFIG,
        generated_circles=None,
        train_shards=(f"pipe:cat {tmp_path / 'one.tar'}",),
        allow_shell_urls=True,
        num_evaluation_samples=4,
    )
    with pytest.raises(ValueError, match="a stream cannot"):
        open_sources(config)
