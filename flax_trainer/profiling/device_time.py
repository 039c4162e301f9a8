"""How long the devices worked in a trace of JAX's profiler.

The trace tells for every operation its name in the compiled program, and the program the path of scopes that the
operation comes from.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from flax_trainer.profiling.trace_parts import module_of, op_names, part_of
from shared.profiling.device_time import DeviceTime, Piece
from shared.profiling.kinds import Kind, kind_of_kernel

_GPU, _TPU, _HOST = "/device:GPU", "/device:TPU", "/host"
_TPU_OPERATIONS = "XLA Ops"  # of a TPU's rows, the one whose events are the program's operations
_INSTRUCTION = re.compile(r"%?([\w.-]+)")

# The last of an operation's scopes, which is what JAX calls it.
_PRIMITIVES: dict[str, Kind] = {
    "conv_general_dilated": "convolutions",
    "dot_general": "matrix products",
    "psum": "collectives",
    "all_gather": "collectives",
    "reduce_scatter": "collectives",
    "transpose": "copies",
    "copy": "copies",
    "concatenate": "copies",
    "convert_element_type": "copies",
    "slice": "copies",
    "pad": "copies",
}


class _Event(NamedTuple):
    name: str
    instruction: str | None  # of the compiled program
    start: float
    end: float


def device_time(trace: Path, program: str, steps: int) -> DeviceTime:
    """Of a trace that holds so many whole steps: of GPUs' kernels and copies, or TPUs' or the CPU's operations.

    Args:
        trace: an `xplane.pb`.
        program: the compiled step, in XLA's notation.
        steps: a time is the mean over them.
    """
    sources = op_names(program)
    profile = ProfileData.from_serialized_xspace(trace.read_bytes())
    return DeviceTime.of(_pieces(_lines(profile, module_of(program)), sources), steps)


def kind_of(op_name: str) -> Kind:
    """Of an operation that comes from this path of scopes."""
    scopes = op_name.split("/")
    for name in ("attention", "normalisation"):
        if any(name in scope for scope in scopes):
            return name
    return _PRIMITIVES.get(scopes[-1], "elementwise")


def _pieces(lines: Iterator[list[_Event]], sources: Mapping[str, str]) -> Iterator[Piece]:
    for events in lines:
        for event, busy in _without_what_they_contain(events):
            op_name = sources.get(event.instruction or "", "")
            part = part_of(op_name)
            named = kind_of(op_name) if op_name else None
            kind = named if named in ("attention", "normalisation") else kind_of_kernel(event.name) or named or "other"
            yield Piece(part, "optimizer" if part == "optimizer" else kind, busy)


def _lines(profile: ProfileData, module: str) -> Iterator[list[_Event]]:
    """The rows on which devices work; those of the host where there is no other device."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith((_GPU, _TPU))]
    for plane in devices or [plane for plane in planes if plane.name.startswith(_HOST)]:
        for line in plane.lines:
            if plane.name.startswith(_GPU):
                if line.name.startswith("Stream"):
                    yield [_event(event, dict(event.stats).get("hlo_op")) for event in line.events]
            elif plane.name.startswith(_TPU):
                if line.name == _TPU_OPERATIONS:
                    yield [_event(event, _instruction_in(event.name)) for event in line.events]
            else:
                stats = [(event, dict(event.stats)) for event in line.events]
                yield [_event(event, of["hlo_op"]) for event, of in stats if of.get("hlo_module") == module]


def _event(event: Any, instruction: Any) -> _Event:
    name = None if instruction is None else str(instruction)
    return _Event(event.name, name, event.start_ns, event.start_ns + event.duration_ns)


def _instruction_in(text: str) -> str | None:
    """A TPU's operations have their line of the program as a name."""
    match = _INSTRUCTION.match(text)
    return None if match is None else match[1]


def _without_what_they_contain(events: list[_Event]) -> Iterator[tuple[_Event, float]]:
    """Nanoseconds that each takes by itself: loops and calls contain the operations in them."""
    open_: list[tuple[_Event, float]] = []
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while open_ and open_[-1][0].end <= event.start:
            yield open_.pop()
        if open_:
            outer, busy = open_[-1]
            open_[-1] = outer, busy - (min(event.end, outer.end) - event.start)
        open_.append((event, event.end - event.start))
    yield from open_
