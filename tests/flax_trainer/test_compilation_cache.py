"""Where compiled programs go."""

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src.compiler import get_compile_options

from flax_trainer.compilation import use_compilation_cache
from shared.run.compiled_programs import default_folder


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    """The session's folder is that of tests/conftest.py, as if JAX_COMPILATION_CACHE_DIR had named it."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    jax.config.update("jax_enable_compilation_cache", True)  # a report that was made in this process leaves it off
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_the_users_cache_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_compilation_cache(None)
    assert folder() == str(tmp_path / "cache" / "controlnet-trainer" / "compiled")
    assert Path(folder()).stat().st_mode & 0o077 == 0, "others could plant programs in it"


def test_a_cpu_has_no_default() -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache(None)
    assert folder() is None


@pytest.mark.parametrize("given", [None, "", "relative/folder"])
def test_without_a_usable_xdg_folder_it_is_in_the_home(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert default_folder() == Path("/home/somebody/.cache/controlnet-trainer/compiled")


def test_the_environment_variable_wins_over_the_default() -> None:
    named = folder()
    assert named is not None
    use_compilation_cache(None)
    assert folder() == named


def test_the_flag_wins_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compilation_cache(str(tmp_path / "named"))
    assert folder() == str(tmp_path / "named")
    assert (tmp_path / "named").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache("~/own")
    assert folder() == str(tmp_path / "own")
    use_compilation_cache("gs://bucket/cache")
    assert folder() == "gs://bucket/cache"
    use_compilation_cache("none")
    assert folder() is None


def test_a_folder_that_cannot_be_made_costs_a_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert folder() is None
    (record,) = caplog.records
    assert str(tmp_path / "file" / "cache") in record.message
    assert "--ccache" in record.message


def test_a_folder_that_cannot_be_written_to_costs_a_warning_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Tests may run as root, to whom every folder is writable.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with caplog.at_level(logging.WARNING):
        use_compilation_cache(str(tmp_path))
    assert folder() is None
    assert "cannot be written to" in caplog.text


def test_what_xla_measured_of_kernels_on_a_gpu_is_kept_beside_the_programs(tmp_path: Path) -> None:
    """JAX sees to it by default: a program that has changed a little is then compiled without measuring anew."""
    use_compilation_cache(str(tmp_path))
    options = get_compile_options(num_replicas=1, num_partitions=1)  # whose parts do not keep it alive
    assert Path(options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir).parent == tmp_path
