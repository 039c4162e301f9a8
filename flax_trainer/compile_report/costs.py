"""Where the cycles of a compiled TPU step go, by part of the model and by kind of work.

The compiler estimates cycles for every fusion and copy of a program's text; a sum over the text is not yet the
program's: a loop's body stands there once, of a conditional all branches, and Pallas kernels and messages between chips
have no estimate. Here loops count as often as they run, the most expensive branch counts, a kernel takes as long as its
products (sides filled up to the multipliers') or its memory traffic, and a message as long as its bytes on the links;
one that is sent while the program goes on delays it by what is left of it when its result is waited for.
The few fusions of which the compiler says that it knows no estimate count as their memory traffic.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flax_trainer.compile_report.collectives import message_of, seconds_of
from flax_trainer.compile_report.hlo import Instruction, Program
from flax_trainer.compile_report.kernels import KernelKey, attention_flops, kernel_key
from flax_trainer.compile_report.targets import Target
from flax_trainer.profiling.trace_parts import part_of

COPIES = ("copy", "transpose", "reshape", "pad", "slice", "concatenate", "bitcast-convert", "dynamic-slice")
NO_ESTIMATE = 2**63 - 1  # what the compiler says of a fusion that it cannot estimate
_PALLAS = 'custom_call_target="tpu_custom_call"'
OTHER = "other"


class Cost(NamedTuple):
    """Of one instruction, as often as it runs."""

    part: str
    kind: str
    cycles: float
    bytes_not_counted: float  # by XLA's own analysis, which sees a loop's body once


@dataclass(frozen=True)
class Costs:
    """All of a program. `unknown_loops` run more often than counted: their end depends on their results."""

    by_part: Mapping[str, float]
    by_kind: Mapping[str, float]
    cycles: float
    collective_cycles: float
    waiting_cycles: float  # of the messages', what nothing else goes on beside
    bytes_not_counted: float
    unknown_loops: int


def costs_of(program: Program, kernels: Mapping[KernelKey, float], target: Target) -> Costs:
    """Count a program for the chips of a target; `kernels` are the FLOPs that `kernel_flops` finds in it.

    `cycles` leaves out the messages between chips.
    """
    counter = _Counter(program, kernels, target)
    in_order = {name: counter.run_instruction(name) for name in program.computations[program.entry]}
    costs = [cost for costs in in_order.values() for cost in costs]
    collectives = math.fsum(cost.cycles for cost in costs if cost.kind == "collectives")
    return Costs(
        _shares(costs, "part"),
        _shares(costs, "kind"),
        math.fsum(cost.cycles for cost in costs) - collectives,
        collectives,
        _waiting(program, in_order),
        math.fsum(cost.bytes_not_counted for cost in costs),
        counter.unknown_loops,
    )


def _shares(costs: list[Cost], attribute: str) -> dict[str, float]:
    """Cycles by what the attribute says, most first."""
    shares: dict[str, float] = {}
    for cost in costs:
        name = getattr(cost, attribute)
        shares[name] = shares.get(name, 0.0) + cost.cycles
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def _waiting(program: Program, in_order: Mapping[str, list[Cost]]) -> float:
    """Cycles in which the entry does nothing but wait for messages, of which the links carry one after the other."""
    now = waited = links_free = 0.0
    sent: dict[str, float] = {}  # when the message will have arrived
    for name, costs in in_order.items():
        instruction = program.computations[program.entry][name]
        message = math.fsum(cost.cycles for cost in costs if cost.kind == "collectives")
        work = math.fsum(cost.cycles for cost in costs) - message
        awaited = [sent[operand] for operand in instruction.operands if operand in sent]
        if message:
            links_free = max(links_free, now) + message
            sent[name] = links_free
            if not instruction.opcode.endswith("-start"):
                awaited.append(links_free)
        arrived = max([now, *awaited])
        waited += arrived - now
        now = arrived + work
    return waited


class _Counter:
    def __init__(self, program: Program, kernels: Mapping[KernelKey, float], target: Target):
        self._program, self._kernels, self._target = program, kernels, target
        self.unknown_loops = 0

    def run(self, computation: str, times: int) -> list[Cost]:
        """What a computation costs that runs so many times, with everything it calls."""
        return [
            cost
            for instruction in self._program.computations[computation].values()
            for cost in self._costs(computation, instruction, times)
        ]

    def run_instruction(self, name: str) -> list[Cost]:
        """What one of the entry's instructions costs."""
        entry = self._program.entry
        return list(self._costs(entry, self._program.computations[entry][name], 1))

    def _costs(self, computation: str, instruction: Instruction, times: int) -> Iterator[Cost]:
        called = instruction.called
        if instruction.opcode == "while":
            yield from self._loop(computation, instruction, times)
        elif instruction.opcode == "conditional":
            branches = [self.run(name, times) for names in called.values() for name in names]
            yield from max(branches, key=lambda costs: math.fsum(cost.cycles for cost in costs))
        elif instruction.opcode in ("call", "async-start"):
            for names in called.values():
                for name in names:
                    yield from self.run(name, times)
        else:
            part = part_of(instruction.op_name) or OTHER
            not_counted = (times - 1) * self._bytes(computation, instruction)
            message = message_of(self._program, instruction, self._target.chips)
            if message is not None:
                cycles = seconds_of(message, self._target) * self._target.chip.clock_ghz * 1e9
                yield Cost(part, "collectives", times * cycles, not_counted)
                not_counted = 0
            kind = self._kind(instruction) if message is None or instruction.opcode == "fusion" else None
            if kind is not None:  # of a fusion, what it does beside sending
                yield Cost(part, kind, times * self._cycles(computation, instruction), not_counted)

    def _loop(self, computation: str, instruction: Instruction, times: int) -> Iterator[Cost]:
        trips = self._trips(computation, instruction)
        if trips is None:
            self.unknown_loops += 1
            trips = 1
        yield from self.run(instruction.called["body"][0], times * trips)

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop runs that counts to a constant, as those of `jax.lax` do; None for others."""
        condition = self._program.computations[loop.called["condition"][0]]
        root = list(condition.values())[-1]
        if root.opcode != "compare" or "direction=LT" not in root.text:
            return None
        counter, limit = (condition[name] for name in root.operands)
        if counter.opcode != "get-tuple-element" or (end := _constant(limit)) is None:
            return None
        index = re.search(r"index=(\d+)", counter.text)
        assert index is not None, counter.text
        return max(0, end - self._beginning(computation, loop, int(index[1])))

    def _beginning(self, computation: str, loop: Instruction, index: int) -> int:
        """What the counter is at first: 0 where no constant stands there, but what surrounds the loop hands it on."""
        (state,) = self._program.operands(computation, loop)
        if state.opcode != "tuple":
            return 0
        beginning = self._program.operands(computation, state)[index]
        while beginning.opcode == "copy":
            (beginning,) = self._program.operands(computation, beginning)
        return _constant(beginning) or 0

    def _cycles(self, computation: str, instruction: Instruction) -> float:
        chip = self._target.chip
        if _PALLAS in instruction.text:
            seconds = max(
                self._kernel_flops(computation, instruction) / (chip.peak_tflops * 1e12),
                self._bytes(computation, instruction) / (chip.hbm_gb_per_s * 1e9),
            )
            return seconds * chip.clock_ghz * 1e9
        if instruction.cycles == NO_ESTIMATE:
            return self._bytes(computation, instruction) / chip.hbm_gb_per_s * chip.clock_ghz
        return instruction.cycles

    def _kernel_flops(self, computation: str, instruction: Instruction) -> float:
        shapes = [operand.shapes[0][1] for operand in self._program.operands(computation, instruction)]
        if not instruction.op_name.endswith("/pallas_call"):
            # The one kernel that XLA writes by itself, for plain attention.
            query, key, value = shapes
            return attention_flops(query, key, value, self._target.chip.multiplier)
        name = instruction.op_name.split("/")[-2].split("(")[-1].rstrip(")")  # …/jvp(NAME)/pallas_call
        return self._kernels[kernel_key(name, shapes)]

    def _bytes(self, computation: str, instruction: Instruction) -> int:
        operands = self._program.operands(computation, instruction)
        return instruction.result_bytes + sum(operand.result_bytes for operand in operands)

    def _kind(self, instruction: Instruction) -> str | None:
        """None of what takes no time: parameters, constants, and waiting for what was counted when it began."""
        opcode = instruction.opcode
        is_kernel = _PALLAS in instruction.text
        if not (instruction.cycles or is_kernel):
            return None
        scopes = instruction.op_name.split("/")
        if is_kernel and any("feed_forward" in scope for scope in scopes):
            return "matrix products"
        if any("attention" in scope for scope in scopes) or is_kernel:
            return "attention"
        if opcode in COPIES:
            return "copies"
        if any("normalisation" in scope for scope in scopes):
            return "normalisation"
        return self._kind_of_fusion(instruction, scopes[-1])

    def _kind_of_fusion(self, instruction: Instruction, primitive: str) -> str:
        inside = [
            other.opcode
            for names in instruction.called.values()
            for name in names
            for other in self._program.computations[name].values()
        ]
        if "convolution" in inside or instruction.opcode == "convolution":
            return "convolutions" if primitive == "conv_general_dilated" else "matrix products"
        return "elementwise"


def _constant(instruction: Instruction) -> int | None:
    match = re.search(r" constant\((-?\d+)\)", instruction.text)
    return None if match is None else int(match[1])
