from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_compilation_cache() -> Iterator[None]:
    """Programs for devices that are not there cannot be read back, which is a warning."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
