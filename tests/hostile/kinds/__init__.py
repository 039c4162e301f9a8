"""The kinds of hostile inputs, and which case is of which: its number alone says."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.hostile.case import Case
from tests.hostile.watched import Attempt


@dataclass(frozen=True)
class Kind:
    """One of them. Its module has `build`, and is imported by the processes of its side alone.

    Attributes:
        side: whose libraries it needs: `shared`, `flax` or `torch`.
        slots: of every `_CYCLE` cases, so many are of this kind; the costly ones have fewer.
    """

    name: str
    side: str
    module: str
    slots: int

    def build(self, case: Case) -> Attempt:
        return importlib.import_module(f"tests.hostile.kinds.{self.module}").build(case)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("data", "shared", "data", 6),
        Kind("preparation", "shared", "preparation", 3),
        Kind("prepared", "shared", "prepared", 3),
        Kind("comparison", "shared", "comparison", 3),
        Kind("configuration", "shared", "configuration", 2),
        Kind("card", "shared", "card", 1),
        Kind("flax_model", "flax", "flax_model", 2),
        Kind("flax_xl_model", "flax", "flax_xl_model", 1),
        Kind("flax_checkpoint", "flax", "flax_checkpoint", 2),
        Kind("torch_model", "torch", "torch_model", 2),
        Kind("torch_xl_model", "torch", "torch_xl_model", 1),
        Kind("torch_checkpoint", "torch", "torch_checkpoint", 2),
        Kind("annotator", "torch", "annotator", 1),
    )
}
SIDES = ("proofs", "shared", "flax", "torch")
_PROOFS = Kind("proofs", "proofs", "proofs", 0)
_CYCLE = tuple(kind for kind in KINDS.values() for _ in range(kind.slots))


class Place(NamedTuple):
    """Of a case among those of its kind."""

    kind: Kind
    rank: int


def place_of(number: int) -> Place:
    """Case `number` is the `rank`-th of its kind. Negative ones are proofs that the fuzzer finds what it looks for."""
    if number < 0:
        return Place(_PROOFS, -1 - number)
    rounds, slot = divmod(number, len(_CYCLE))
    kind = _CYCLE[slot]
    return Place(kind, rounds * kind.slots + slot - _CYCLE.index(kind))


def kind_of(number: int) -> Kind:
    return place_of(number).kind


def numbers_of(kinds: Sequence[str], count: int) -> list[int]:
    """The first `count` cases that are of these kinds."""
    wanted, numbers, number = set(kinds), list[int](), 0
    while len(numbers) < count:
        if kind_of(number).name in wanted:
            numbers.append(number)
        number += 1
    return numbers


def warm_up(side: str) -> None:
    """Import everything that the kinds of a side need, once for all of their cases."""
    for kind in (*KINDS.values(), _PROOFS):
        if kind.side == side:
            importlib.import_module(f"tests.hostile.kinds.{kind.module}")


def originals() -> Path:
    """The honest files that `tests.hostile.originals` has written, of which cases mutate copies."""
    return Path(os.environ["HOSTILE_ORIGINALS"])
