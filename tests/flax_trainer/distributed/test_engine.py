"""What a configuration asks of an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from flax_trainer.distributed.engine import check_engine_fits
from shared.config import TrainConfig


def test_buckets_are_refused_where_a_step_would_be_compiled_in_the_middle_of_a_run() -> None:
    in_several_processes: Any = SimpleNamespace(compiles_ahead=False)
    alone: Any = SimpleNamespace(compiles_ahead=True)
    with pytest.raises(ValueError, match=r"--parallelism pmap cannot .* Add --parallelism mesh"):
        check_engine_fits(TrainConfig(aspect_buckets=5), in_several_processes)
    check_engine_fits(TrainConfig(aspect_buckets=5), alone)
    check_engine_fits(TrainConfig(), in_several_processes)
