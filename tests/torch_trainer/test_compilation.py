"""Where torch.compile's programs go."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.config import TrainConfig
from shared.user_errors import UserError
from torch_trainer.compilation import keep_compiled_programs

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "")  # so that it is as before after the test, whoever sets it
    monkeypatch.delenv(VARIABLE)


@pytest.fixture(autouse=True)
def _own_setting() -> Iterator[None]:
    with torch.compiler.config.patch(force_disable_caches=False):
        yield


def keep(**flags: str) -> str | None:
    keep_compiled_programs(TrainConfig(**({"torch_compile": True} | flags)))  # type: ignore[arg-type]
    return os.environ.get(VARIABLE)


def test_the_users_cache_folder_is_the_default(tmp_path: Path) -> None:
    folder = keep()
    assert folder == str(tmp_path / "cache" / "controlnet-trainer" / "compiled" / "torch")
    assert Path(folder).stat().st_mode & 0o077 == 0, "others could plant programs in it"
    assert torch._inductor.runtime.cache_dir_utils.cache_dir() == folder


def test_the_environment_variable_wins_over_it_and_the_flag_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/named/by/environment")
    assert keep() == "/named/by/environment"
    assert keep(ccache=str(tmp_path / "named")) == str(tmp_path / "named")


def test_none_keeps_nothing() -> None:
    assert keep(ccache="none") is None
    assert torch.compiler.config.force_disable_caches


def test_what_is_not_compiled_needs_no_folder(tmp_path: Path) -> None:
    keep_compiled_programs(TrainConfig())
    assert VARIABLE not in os.environ
    assert not (tmp_path / "cache").exists()


def test_an_address_is_refused() -> None:
    with pytest.raises(UserError, match="--ccache is an address"):
        keep(ccache="gs://bucket/compiled")


def test_a_folder_that_cannot_be_made_costs_a_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert keep(ccache=str(tmp_path / "file" / "folder")) is None
    assert "--ccache" in caplog.text
