"""What every test runs under: JAX on eight simulated CPU devices, no network, one cache of compiled programs."""

import os
import signal

from tests.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)

from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
# What starts processes that import JAX or PyTorch, or compiles whole models: left out by --fast, otherwise begun
# first, the longest at the top, so that at the end no worker waits for a long file of another.
SLOW = (
    "end_to_end/test_parallelism.py",  # the programs of both engines, which others find in the cache
    "end_to_end/test_training_run.py",
    "end_to_end",
    "flax_trainer/compile_report",
    "parity",
    "flax_trainer/models",
    "flax_trainer/training",
    "flax_trainer/distributed",
    "flax_trainer/evaluation",
    "flax_trainer/profiling",
    "flax_trainer/checkpoints",
    "flax_trainer/test_text_encoding.py",
    "hostile",
    "tpu_vm",
    "cloud",
    "torch_trainer/training",
    "torch_trainer/checkpoints",
    "torch_trainer/evaluation",
    "torch_trainer/profiling/test_model_flops.py",
    "shared/prepare_data/test_killed_packing.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what starts processes or compiles whole models")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("fast") and _slowness(collection_path) < len(SLOW) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _slowness(item.path))


def _slowness(path: Path) -> int:
    """Where the path stands in `SLOW`, the end if it is in none."""
    return next((rank for rank, part in enumerate(SLOW) if path.is_relative_to(TESTS / part)), len(SLOW))


def pytest_configure() -> None:
    # How long an example takes says something about the machine.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")
    # A shell without job control starts what it sends to the background with Ctrl-C ignored, which programs inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(request: pytest.FixtureRequest) -> None:
    """Compile each program once, also for the processes that tests start, for the other workers and the next session.

    JAX finds a program by its code, the flags, and the versions of what compiles it. `--cache-clear` begins anew.
    """
    import jax

    assert request.config.cache is not None
    folder = str(request.config.cache.mkdir("compiled-programs"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x with random weights, in diffusers' folder layout."""
    from flax_trainer.random_model import ARCHITECTURES, write_random_model

    folder = tmp_path_factory.mktemp("base-model")
    write_random_model(ARCHITECTURES["tiny"], folder)
    return folder


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL with random weights."""
    from flax_trainer.random_model import ARCHITECTURES, write_random_model

    folder = tmp_path_factory.mktemp("xl-model")
    write_random_model(ARCHITECTURES["tiny_xl"], folder)
    return folder
