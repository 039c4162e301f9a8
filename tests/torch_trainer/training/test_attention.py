"""--enable_xformers_memory_efficient_attention and --enable_npu_flash_attention, where they can run and where not."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import TrainConfig
from torch_trainer.training.attention import choose_attention

CPU = torch.device("cpu")
XFORMERS, NPU = "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"
WORKS = "return query.square()"
NO_OPERATOR = (
    "No operator found for `memory_efficient_attention_forward` with inputs:\\n     query : shape=(1, 8, 2, 40)"
)

Install = Callable[[str, str], None]


class Model:
    """Counts what diffusers' models are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.told.append(name)


def choose(*flags: str, device: torch.device = CPU) -> list[list[str]]:
    models = [Model(), Model()]
    choose_attention(TrainConfig(**dict.fromkeys(flags, True)), models, device)
    return [model.told for model in models]


def refusal(flag: str, device: torch.device = CPU) -> str:
    with pytest.raises(ValueError, match=f"--{flag}") as refused:
        choose(flag, device=device)
    assert "Leave the flag out" in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Packages of that name are put on the path, with an `ops.memory_efficient_attention` of that body."""
    installed: list[str] = []

    def put(name: str, body: str) -> None:
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "ops.py").write_text(f"def memory_efficient_attention(query, key, value):\n    {body}\n")
        metadata = tmp_path / f"{name}-0.0.99.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.99\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        installed.append(name)

    yield put
    for module in [module for module in sys.modules if module.split(".")[0] in installed]:
        del sys.modules[module]


@pytest.fixture(autouse=True)
def _nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it is."""
    for name in ("xformers", "torch_npu"):
        assert name not in sys.modules
    monkeypatch.setattr(sys, "path_importer_cache", {})


def test_without_a_flag_nothing_is_changed() -> None:
    assert choose() == [[], []]


@pytest.mark.parametrize(("flag", "package"), [(XFORMERS, "xformers"), (NPU, "torch_npu")])
def test_a_package_that_is_not_installed(flag: str, package: str) -> None:
    message = refusal(flag)
    assert package in message
    assert "not installed" in message


def test_xformers_that_runs_is_used_by_every_model(install: Install) -> None:
    install("xformers", WORKS)
    assert choose(XFORMERS) == [["enable_xformers_memory_efficient_attention"]] * 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f'raise NotImplementedError("{NO_OPERATOR}")', "No operator found"),
        ("raise NotImplementedError", "NotImplementedError"),
        ('raise ValueError("Device type privateuseone is not supported")', "is not supported"),
        ('raise RuntimeError("CUDA error: no kernel image is available")', "no kernel image"),
        ("import xformers_cuda_extension", "No module named 'xformers_cuda_extension'"),
        ("import torch; return torch.gone_since(query)", "has no attribute 'gone_since'"),
        ('import ctypes; ctypes.CDLL("libcudart.so.0")', "libcudart.so.0"),
        ("return query.detach()", "does not require grad"),
    ],
)
def test_xformers_that_cannot_run_says_why(install: Install, body: str, reason: str) -> None:
    """Often enough it is built for another PyTorch, or there is no GPU; or it has no backward pass."""
    install("xformers", body)
    message = refusal(XFORMERS)
    for part in (reason, "0.0.99", "cpu", torch.__version__):
        assert part in message


def test_torch_npu_without_an_npu(install: Install) -> None:
    install("torch_npu", WORKS)
    assert "this run is on cpu" in refusal(NPU)


def test_npu_attention_is_used_on_an_npu(install: Install) -> None:
    install("torch_npu", WORKS)

    class Device:
        type = "npu"

    assert choose(NPU, device=Device()) == [["enable_npu_flash_attention"]] * 2  # type: ignore[arg-type]


def test_diffusers_models_take_what_they_are_told() -> None:
    """The names above are those of diffusers' methods."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    for model in (ControlNetModel, UNet2DConditionModel):
        assert callable(getattr(model, XFORMERS))
        assert callable(getattr(model, NPU))
