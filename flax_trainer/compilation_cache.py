"""Where compiled programs are kept from one run to the next."""

import logging
import os
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

OFF = "none"
_FOLDER = Path("controlnet-trainer") / "compiled"


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
    problem = _problem(folder)
    if problem is not None:
        logger.warning(
            "Compiled programs are not kept for the next run: %s cannot be %s. Name another folder with --ccache, or "
            "do without one by --ccache none.",
            *(folder, problem),
        )
    jax.config.update("jax_compilation_cache_dir", str(folder) if problem is None else None)


def default_folder() -> Path:
    """The project's part of the user's cache folder."""
    # The specification tells to ignore relative paths.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / _FOLDER


def _named_by_environment() -> str | None:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made when JAX is imported


def _problem(folder: Path) -> str | None:
    """What prevents keeping files there, in words."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"made ({error.strerror})"
    return None if os.access(folder, os.W_OK | os.X_OK) else "written to"
