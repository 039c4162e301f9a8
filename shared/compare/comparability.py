"""May two runs be compared step by step? Only if they were to see the same batches and minimise the same loss."""

import dataclasses
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.compare.run import Run
from shared.config.flags import Flag
from shared.config.options import FLAGS
from shared.untrusted import shown
from shared.user_errors import UserError

MUST_MATCH = [flag for flag in FLAGS.values() if "compare" in flag.must_match]
"""Flags that decide what a batch holds or what its loss means."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A setting by its name, with the value in either run."""

    name: str
    a: Any
    b: Any


def check_comparable(a: Run, b: Run) -> None:
    """Raises UserError where a comparison would mean nothing, naming everything that differs."""
    differences = [
        Difference(f"--{flag.name}", getattr(a.config, flag.name), getattr(b.config, flag.name))
        for flag in MUST_MATCH
        if not _same(flag)(getattr(a.config, flag.name), getattr(b.config, flag.name))
    ]
    if a.global_batch_size != b.global_batch_size:
        differences.append(Difference("images per step", a.global_batch_size, b.global_batch_size))
    if a.steps != b.steps:
        differences.append(Difference("optimizer steps", a.steps, b.steps))
    if differences:
        lines = "\n".join(f"  {row.name}: {shown(repr(row.a))} and {shown(repr(row.b))}" for row in differences)
        raise UserError(
            f"{shown(a.folder)} and {shown(b.folder)} cannot be compared step by step, because these differ. "
            f"Train one of them again with the values of the other.\n{lines}"
        )


def setting_differences(a: Run, b: Run) -> list[Difference]:
    """Every flag that differs, except where the runs lie."""
    return [
        Difference(field.name, getattr(a.config, field.name), getattr(b.config, field.name))
        for field in dataclasses.fields(a.config)
        if field.name != "output_dir" and getattr(a.config, field.name) != getattr(b.config, field.name)
    ]


def _same(flag: Flag) -> Callable[[Any, Any], bool]:
    return _same_locations if flag.is_location else operator.eq


def _same_locations(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_location, a, b))
    if a is None or b is None:
        return a is b
    return _same_location(a, b)


def _same_location(a: str, b: str) -> bool:
    """Equal, or a path somewhere else with the same last part."""
    may_have_moved = any(Path(one).is_absolute() or os.path.exists(one) or "://" in one for one in (a, b))
    return a == b or (may_have_moved and Path(a).name == Path(b).name)
