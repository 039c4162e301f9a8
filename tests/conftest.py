"""What every test runs under: JAX on eight simulated CPU devices, no network, one compilation cache for the session."""

import os
import signal

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # tests run side by side, and PyTorch's threads wait for each other on a busy machine
    WANDB_MODE="disabled",
)

from pathlib import Path

import hypothesis
import pytest


def pytest_configure() -> None:
    # How long an example takes says something about the machine.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")
    # A shell without job control starts what it sends to the background with Ctrl-C ignored, which programs inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile each program once, also for the processes that tests start."""
    import jax

    folder = str(tmp_path_factory.mktemp("compilation-cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x with random weights, in diffusers' folder layout."""
    from flax_trainer.random_model import write_random_model

    folder = tmp_path_factory.mktemp("base-model")
    write_random_model("tiny", folder)
    return folder
