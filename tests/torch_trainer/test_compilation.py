"""What torch.compile makes programs of, and where these go."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import TrainConfig
from shared.user_errors import UserError
from torch_trainer.compilation import compile_model, keep_compiled_programs

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


class Halved(torch.nn.Module):
    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels_BCHW, 2)


@pytest.mark.parametrize("aspect_buckets", [None, 12])
def test_each_of_a_dozen_shapes_has_a_program_of_its_own(
    aspect_buckets: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without buckets PyTorch makes one for all after the second shape."""
    sides: list[Any] = []

    def only_counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sides.extend(inputs[0].shape[2:] if isinstance(inputs[0], torch.Tensor) else [inputs[0]])
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, **how: compile_module(model, backend=only_counting, **how)
    )
    model = Halved()
    with torch.compiler.config.patch(recompile_limit=8):
        compile_model(model, TrainConfig(aspect_buckets=aspect_buckets))
        for _ in range(2):
            for side in range(8, 32, 2):
                assert model(torch.zeros(1, 1, side, 40 - side)).shape == (1, 1, side // 2, 20 - side // 2)
    torch.compiler.reset()
    are_static = all(isinstance(side, int) for side in sides)
    assert are_static == (aspect_buckets is not None)
    assert (len(sides) == 2 * 12) == (aspect_buckets is not None)


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
