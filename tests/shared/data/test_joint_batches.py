"""The batches of a process whose data fail while others wait for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.data.batches import BatchLoader, BatchSpec
from shared.data.joint_batches import JointBatches, without_finite_loss
from shared.user_errors import UserError
from tests.shared.data.pictures import config, loader, pairs, write_prompt_json


def spoiled(folder: Path, **options: Any) -> BatchLoader:
    """One sample of twenty cannot be read, and none may be skipped; no batch is made ahead."""
    write_prompt_json(folder, pairs())
    (folder / "image" / "0003.png").write_bytes(b"no image")
    settings = config(train_data_dir=str(folder), max_skipped_samples=0, dataloader_num_workers=0, **options)
    return loader(settings, BatchSpec(2, 1, 2))


def test_they_go_on_without_a_finite_loss(tmp_path: Path) -> None:
    batches = JointBatches(spoiled(tmp_path), 0, is_one_of_several=True)
    given = [batches.next(step) for step in range(6)]
    failed = [step for step in range(6) if np.isnan(given[step]["noise"]).any()]
    assert failed == list(range(failed[0], 6))
    assert failed[0] > 0
    assert [batches.have_failed(step + 1) for step in range(6)] == [step in failed for step in range(6)]
    for name, array in given[failed[0]].items():
        assert (array.shape, array.dtype) == (given[0][name].shape, given[0][name].dtype)
    assert isinstance(batches.failure(failed[0] + 1), UserError)
    assert "--max_skipped_samples" in str(batches.failure(failed[0] + 1))


def test_alone_it_is_told_at_once(tmp_path: Path) -> None:
    batches = JointBatches(spoiled(tmp_path), 0, is_one_of_several=False)
    with pytest.raises(UserError, match="--max_skipped_samples"):
        [batches.next(step) for step in range(6)]
    assert not batches.have_failed(6)


@pytest.mark.parametrize(("step", "kept"), [(3, "What was trained until step 2 is saved"), (1, "Nothing was trained")])
def test_the_others_hear_that_it_was_not_they(tmp_path: Path, step: int, kept: str) -> None:
    write_prompt_json(tmp_path, pairs())
    batches = JointBatches(loader(config(train_data_dir=str(tmp_path)), BatchSpec(2)), 0, is_one_of_several=True)
    assert f"Another process of this run met data that it cannot use in step {step}" in str(batches.failure(step))
    assert kept in str(batches.failure(step))


def test_nothing_but_the_noise_is_no_number() -> None:
    batch = without_finite_loss({"noise": np.zeros(2, np.float32), "timesteps": np.array([7, 9], np.int32)})
    assert np.isnan(batch["noise"]).all()
    assert batch["timesteps"].tolist() == [0, 0]
