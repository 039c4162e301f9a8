"""Compiling the training step: ahead of its first call, at which precision, and where programs are kept."""

import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from shared.config import TrainConfig
from shared.data.views import Size
from shared.run.compiled_programs import OFF, default_folder, usable
from shared.threads import in_background

logger = logging.getLogger(__name__)


class CompiledAhead:
    """A jitted or pmapped function that is compiled once, in a thread of its own, for arguments of known shapes.

    It may be compiled for pictures of several sizes, one after the other: each is a program of its own. Without
    `compile_for` it is compiled when it is first called, by itself.

    A compiler works for minutes without Python's lock: the data threads and whoever calls this go on meanwhile, and
    signals are heard.
    """

    def __init__(self, function: jax.stages.Wrapped):
        self._function = function
        self._compiled: dict[Size | None, Future[jax.stages.Compiled]] = {}

    def compile_for(self, *example: Any, size: Size | None = None) -> None:
        """Begin, or go on after the one before.

        Args:
            example: only shapes, dtypes and placement of its arrays count; none of them is kept.
            size: the (width, height) of its pictures, by which calls find their program.
        """
        before = list(self._compiled.values())[-1:]
        self._compiled[size] = in_background(self._compile, before, size, *map(shape_dtype_structs, example))

    def wait(self) -> None:
        """Until there is no more to compile. Raises whatever compiling raised."""
        for compiled in self._compiled.values():
            compiled.result()

    def __call__(self, *args: Any, size: Size | None = None) -> Any:
        """Raises whatever compiling raised."""
        return self._compiled[size].result()(*args) if self._compiled else self._function(*args)

    def text(self) -> str:
        """The compiled program in XLA's notation; empty where there is none, or several."""
        if len(self._compiled) != 1:
            return ""
        (compiled,) = self._compiled.values()
        return compiled.result().as_text() or ""

    def close(self) -> None:
        """Say so where an error will not end the process at once."""
        if not all(compiled.done() for compiled in self._compiled.values()):
            logger.info("The training step is still being compiled, and cannot be stopped: the process ends after it")

    def _compile(
        self, before: list[Future[jax.stages.Compiled]], size: Size | None, *example: Any
    ) -> jax.stages.Compiled:
        for other in before:
            other.result()
        started = time.perf_counter()
        compiled = self._function.lower(*example).compile()
        told = "" if size is None else " for pictures of {}x{}".format(*size)
        logger.info("The training step is compiled%s (%.1f s)", told, time.perf_counter() - started)
        return compiled


def shape_dtype_structs(tree: Any) -> Any:
    """A tree of arrays as `jax.ShapeDtypeStruct`s, placed as the arrays are."""

    def shape(value: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))

    return jax.tree.map(shape, tree)


def matmul_precision(config: TrainConfig) -> str:
    """What `jax_default_matmul_precision` has to be."""
    if config.mixed_precision == "bf16":
        # Little else is multiplied, and these products are exact in float32. Asked for more, XLA takes the trained
        # weights before they are rounded to bfloat16, which a TPU then multiplies in three passes. (SDXL's VAE, which
        # is in float32, needs the range of its activations and not their last digits.)
        return "default"
    return "tensorfloat32" if config.allow_tf32 else "highest"


def use_compilation_cache(ccache: str | None) -> None:
    """Let JAX keep what takes more than a second to compile, for this process from its next compilation on.

    Where, in this order: `ccache` (the value of --ccache, `none` for nowhere), the environment variable
    JAX_COMPILATION_CACHE_DIR, which JAX reads itself, and the user's cache folder (XDG Base Directory Specification).
    Programs are found again by their code, their compiler and their device, so folders may be shared by runs. Without a
    folder that can be written to there is a warning and no cache: it saves time, so its lack must not cost a run.

    On CPUs there is no default: some Intel ones reject their own programs when these are read back, with alarming
    messages (https://github.com/jax-ml/jax/issues/38445).

    A cached program runs with the rights of whoever loads it, so the folder is made for the user alone.
    """
    if ccache == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
    elif ccache is not None and "://" in ccache:  # JAX reads and writes object stores
        jax.config.update("jax_compilation_cache_dir", ccache)
    elif ccache is not None:
        _use(Path(ccache).expanduser())
    elif _named_by_environment() is None and jax.default_backend() != "cpu":
        _use(default_folder())


def _use(folder: Path) -> None:
    found = usable(folder)
    jax.config.update("jax_compilation_cache_dir", None if found is None else str(found))


def _named_by_environment() -> str | None:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made when JAX is imported
