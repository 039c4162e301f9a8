"""What a single process is spared of what several do."""

import pytest

from flax_trainer.distributed.processes import (
    JointRequests,
    agree_or_raise,
    any_process,
    broadcast_config,
    end_after_error,
    without_processes,
)
from shared.config import TrainConfig
from shared.run.requests import Requests


def test_the_file_of_a_run_does_not_say_who_the_others_were() -> None:
    config = TrainConfig(coordinator_address="10.0.0.2:8476", num_processes=4, process_id=3, local_rank=3)
    assert without_processes(config) == TrainConfig()


def test_a_single_process_agrees_with_itself() -> None:
    config = TrainConfig(pretrained_model_name_or_path="model", generated_circles=8)
    assert any_process(True)
    assert not any_process(False)
    assert broadcast_config(config) is config
    assert end_after_error(2) == 2
    with agree_or_raise():
        pass
    with pytest.raises(ValueError, match="mine"), agree_or_raise():
        raise ValueError("mine")
    requests = JointRequests()
    for mine in (Requests(), Requests(stop=True), Requests(save=True)):
        assert requests.poll(mine) == mine
