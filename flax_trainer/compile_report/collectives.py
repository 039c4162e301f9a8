"""How long messages between the chips of a slice take, if nothing else is on the links."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_trainer.compile_report.hlo import Instruction, Program
from flax_trainer.compile_report.targets import Target

_NAMES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_NUMBERED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")


class Message(NamedTuple):
    """What the chips of each group tell one another, all groups at once."""

    bytes_of_whole: int  # of the array of which every chip has, or gets, a part
    rounds: int  # sums that go back to all are sent twice
    group: tuple[int, ...]  # the chips of one of the groups, numbered as the program does


def message_of(program: Program, instruction: Instruction, chips: int) -> Message | None:
    """The message that an instruction of a program for so many chips is, or that a fusion sends; None for others."""
    if _name(instruction) in _NAMES:
        return _message(instruction, chips, keeps_slice=False)
    if instruction.opcode == "fusion":
        for computation in instruction.called.get("calls", ()):
            inside = program.computations[computation].values()
            for other in inside:
                if _name(other) in _NAMES:
                    keeps_slice = any(another.opcode == "dynamic-slice" for another in inside)
                    return _message(other, chips, keeps_slice)
    return None


def seconds_of(message: Message, target: Target) -> float:
    """On a ring, every byte passes every link once in a round (Patarasuk & Yuan 2009)."""
    chips = len(message.group)
    if chips == 1:
        return 0.0
    sent = message.rounds * message.bytes_of_whole * (chips - 1) / chips
    return sent / (target.links(message.group) * target.chip.link_gb_per_s * 1e9)


def group_of(text: str, chips: int) -> tuple[int, ...]:
    """The first group that an instruction names, in one of XLA's notations; all chips, where it names none."""
    if match := _LISTED.search(text):
        return tuple(_integers(match[1]))
    if match := _NUMBERED.search(text):
        return _as_tuple(_numbered(_integers(match[2]), match[3]).reshape(_integers(match[1]))[0])
    if match := _MESH.search(text):
        axes, along = _MESH_AXIS.findall(match[1]), re.findall(r"'([^']+)'", match[4])
        sizes = [int(size) for _, size in axes]
        grid = _numbered(_integers(match[2]) if match[2] else sizes, match[3]).reshape(sizes)
        return _as_tuple(grid[tuple(slice(None) if name in along else 0 for name, _ in axes)])
    assert "replica_groups=" not in text or "replica_groups={}" in text, text[:300]
    return tuple(range(chips))


def _message(instruction: Instruction, chips: int, keeps_slice: bool) -> Message:
    name, group, size = _name(instruction), group_of(instruction.text, chips), instruction.result_bytes
    goes_on_alone = instruction.opcode.endswith("-start")
    if name == "collective-permute":  # to a neighbour, over one link; its operand is among the results of a start
        return Message(size if goes_on_alone else 2 * size, 1, (0, 1))
    if name == "reduce-scatter":
        return Message(size * len(group), 1, group)
    if name == "all-gather" and goes_on_alone:  # as well
        return Message(size * len(group) // (len(group) + 1), 1, group)
    return Message(size, 2 if name == "all-reduce" and not keeps_slice else 1, group)


def _numbered(sizes: Sequence[int], order: str | None) -> np.ndarray:
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    return numbers if order is None else numbers.transpose(_integers(order))


def _as_tuple(numbers: np.ndarray) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers.flat)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _name(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")
