"""What torch.compile compiles, and where it keeps that."""

import os
from pathlib import Path

import torch

from shared.config import TrainConfig
from shared.run.compiled_programs import OFF, default_folder, usable
from shared.user_errors import UserError

_PROGRAMS_OF_A_SHAPE = 8  # PyTorch's own limit, for all shapes
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_model(model: torch.nn.Module, config: TrainConfig) -> None:
    """Let `--torch_compile` compile a model when it is first called.

    With `--aspect_buckets` that is a program for every shape. Of a second shape PyTorch would else make one program for
    all, which is slower, and after some it would compile no more.
    """
    if config.aspect_buckets is None:
        model.compile()
        return
    # One more for evaluation and sampling.
    torch.compiler.config.recompile_limit = _PROGRAMS_OF_A_SHAPE * (config.aspect_buckets + 1)
    model.compile(dynamic=False)


def keep_compiled_programs(config: TrainConfig) -> None:
    """Let `--torch_compile` keep its programs for the next run, which then starts in a thirtieth of the time.

    Where, in this order: `--ccache` (`none` for nowhere), TORCHINDUCTOR_CACHE_DIR, which PyTorch reads itself, and the
    user's cache folder. PyTorch's own choice, a folder of /tmp, is gone after a restart of the machine.

    Raises:
        UserError: `--ccache` is an address.
    """
    if not config.torch_compile:
        return
    if config.ccache == OFF:
        torch.compiler.config.force_disable_caches = True
    elif config.ccache is not None and "://" in config.ccache:
        raise UserError(
            "--ccache is an address, and PyTorch keeps compiled programs in a folder of this machine. Give a folder, "
            "or none."
        )
    elif config.ccache is not None or _VARIABLE not in os.environ:
        folder = usable(Path(config.ccache).expanduser() if config.ccache else default_folder() / "torch")
        if folder is not None:
            os.environ[_VARIABLE] = str(folder)
