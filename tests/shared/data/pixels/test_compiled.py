"""A cache that is lost costs time, and nothing else."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba.core.config
import pytest

from shared.data.pixels import compiled  # with all that is compiled at its side, before the cache is elsewhere

SOURCE = """
import numba
from shared.data.pixels.compiled import compiled

@compiled(numba.int64(numba.int64))
def twice(number):
    return 2 * number
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """A new module of that source, as a new process would import it. Its cache is in `tmp_path / "cache"`."""
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "compiled_here.py"
    file.write_text(SOURCE)

    def new_module() -> ModuleType:
        spec = importlib.util.spec_from_file_location("compiled_here", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return new_module


def cached(tmp_path: Path, kind: str) -> list[Path]:
    return [*(tmp_path / "cache").rglob(f"*.{kind}")]


def test_what_was_compiled_is_found_again(load: Callable[[], ModuleType], tmp_path: Path) -> None:
    assert load().twice(21) == 42
    (code,) = cached(tmp_path, "nbc")
    written = code.stat().st_mtime_ns
    again = load()
    assert again.twice(21) == 42
    assert again.twice.stats.cache_hits
    assert code.stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", ["nbi", "nbc"])  # the index, the code
@pytest.mark.parametrize("content", [b"", b"\x80\x04damaged", bytes(100)])
def test_a_damaged_cache_is_of_no_use(
    load: Callable[[], ModuleType], tmp_path: Path, kind: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    (file,) = cached(tmp_path, kind)
    file.write_bytes(content)
    with caplog.at_level(logging.INFO, compiled.logger.name):
        assert load().twice(21) == 42
    assert "twice is compiled anew in this run: its cache is of no use" in caplog.text


def test_no_folder_for_a_cache(
    load: Callable[[], ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cache", "__pycache__", "home"):  # where Numba looks, in this order
        (tmp_path / name).write_text("a file stands there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with caplog.at_level(logging.INFO, compiled.logger.name):
        assert load().twice(21) == 42
    assert "twice is compiled anew" in caplog.text
