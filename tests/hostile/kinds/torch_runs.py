"""A training with PyTorch, up to its first step: everything is read, checked, restored, and on the device."""

from collections.abc import Sequence
from typing import Any, NoReturn

import datasets  # noqa: F401 (in the warm process, for its children)
import transformers.models.clip.modeling_clip  # noqa: F401

import torch_trainer.loop
import torch_trainer.train
from shared.config import parse_command_line
from tests.hostile.case import Case
from tests.hostile.signs import signs_in_files
from tests.hostile.watched import Attempt


class _Reached(BaseException):
    """The run would begin."""


def _reach(*_: Any, **__: Any) -> NoReturn:
    raise _Reached


torch_trainer.loop.Loop.run = _reach  # type: ignore[method-assign]


def attempt(case: Case, what: str, words: Sequence[str], is_honest: bool) -> Attempt:
    """Of a run with this command line."""

    def run() -> int:
        try:
            return torch_trainer.train.train(parse_command_line(words, "torch"))
        except _Reached:
            return 0

    return Attempt(
        what,
        run,
        lambda: signs_in_files(case, case.out / "run"),
        is_honest=is_honest,
        private=(case.inputs / "another",),
    )
