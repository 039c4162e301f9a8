from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _as_users_compile() -> Iterator[None]:
    """With all optimisations, whose costs are the figures, and without a cache.

    Programs for devices that are not there cannot be read back, which is a warning; so none is written. Whether there
    is a cache at all, JAX asks once per process.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
