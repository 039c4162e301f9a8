"""What the tests of the PyTorch backend share: one thread, and accelerate's process-wide state taken down again."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are too small to gain from more, and the order of sums is then always the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_accelerate_state() -> Iterator[None]:
    """Every test starts without what the one before told accelerate."""
    from tests.torch_trainer.tiny_training import forget_accelerate_state

    forget_accelerate_state()
    yield
    forget_accelerate_state()
