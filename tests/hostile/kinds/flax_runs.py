"""A training with JAX, up to where its first step would be compiled: everything is read, checked, and on the device."""

from collections.abc import Sequence
from typing import Any, NoReturn

import datasets  # noqa: F401 (in the warm process, for its children)
import transformers.models.clip  # noqa: F401

import flax_trainer.train
from shared.config import parse_command_line
from tests.hostile.case import Case
from tests.hostile.signs import signs_in_files
from tests.hostile.watched import Attempt


class _Reached(BaseException):
    """The run would begin."""


def _reach(*_: Any, **__: Any) -> NoReturn:
    raise _Reached


flax_trainer.train.announce = _reach


def attempt(case: Case, what: str, words: Sequence[str], is_honest: bool) -> Attempt:
    """Of a run with this command line."""

    def run() -> int:
        try:
            return flax_trainer.train.train(parse_command_line(words, "flax"))
        except _Reached:
            return 0

    return Attempt(
        what,
        run,
        lambda: signs_in_files(case, case.out / "run"),
        is_honest=is_honest,
        private=(case.inputs / "another",),
    )
