from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_compilation_cache() -> Iterator[None]:
    """Programs for devices that are not there cannot be read back, which is a warning; so none is written.

    Whether there is a cache at all, JAX asks once per process.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
