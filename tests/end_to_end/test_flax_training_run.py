"""Whole training runs in JAX: what concerns that backend alone. `test_training_run.py` has what concerns both."""

from pathlib import Path

import numpy as np

from tests.end_to_end.support.running import losses, train_flax
from tests.end_to_end.support.tiny_runs import arguments


def test_eight_devices_train_like_one(base_model: Path, tmp_path: Path) -> None:
    train_flax(arguments(base_model, tmp_path / "one", "--max_train_steps", 4))
    train_flax(arguments(base_model, tmp_path / "eight", "--train_batch_size", 1, "--max_train_steps", 4), devices=8)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)
