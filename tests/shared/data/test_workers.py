"""How many threads prepare batches where nobody says so."""

import os
import threading
import time
import weakref

import pytest

from shared.config import TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import open_sources
from shared.data.tokenization import PromptInputs
from shared.data.workers import Workers, threads_beside_accelerators
from tests.shared.data.pictures import tokenize


@pytest.mark.parametrize(
    ("processors", "processes", "threads"), [(8, 1, 7), (1, 1, 1), (96, 1, 16), (96, 8, 11), (4, 8, 1)]
)
def test_processors_are_shared(processors: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)), raising=False)
    assert threads_beside_accelerators(processes) == threads


class Result:
    pass


def test_an_idle_thread_holds_nothing_of_what_it_did() -> None:
    workers = Workers(1)
    done = workers.submit(Result)
    held = weakref.ref(done.result(timeout=10))
    del done
    deadline = time.monotonic() + 10
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert held() is None
    workers.close()


@pytest.mark.parametrize(("flag", "threads"), [(None, 3), (0, 0), (2, 2)])
def test_the_flag_wins_over_the_device(flag: int | None, threads: int) -> None:
    config = TrainConfig(generated_circles=4, resolution=8, dataloader_num_workers=flag)
    before = set(threading.enumerate())
    loader = BatchLoader(
        open_sources(config)[0],
        config,
        PromptInputs(tokenize),
        BatchSpec(2),
        latent_shape=(1, 1, 4),
        num_train_timesteps=1000,
        default_workers=3,
    )
    assert len(set(threading.enumerate()) - before) == threads
    loader.close()
