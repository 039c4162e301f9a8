"""Names the parts of the model in a trace of a CPU.

On TPUs and GPUs, xprof reads from the trace which `jax.named_scope` an operation belongs to and draws the scopes above
the operations. A CPU's trace has the names of the operations alone, so here the scopes are looked up in the compiled
program and added to the trace as a device of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from shared.profiling.parts import PARTS, PLANE, backward
from shared.profiling.xspace import Line, Plane, Slice, encode

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*\bop_name="([^"]*)"', re.MULTILINE)
_SCOPE = re.compile(rf"^((?:\w+\()*)({'|'.join(PARTS)})\)*$")
_MODULE = re.compile(r"^HloModule ([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Span:
    """Operations of one part that follow each other in a thread; times in nanoseconds from the trace's start."""

    thread: str
    part: str
    start: int
    end: int


def part_of(op_name: str) -> str | None:
    """The part of the model that an operation belongs to, with its direction where that is backward.

    `op_name` is what JAX gives an operation: the path of its scopes, each in the transformations that it went through,
    as `jit(train_step)/transpose(jvp(unet))/dot_general`. None outside of all parts.
    """
    for scope in op_name.split("/"):
        if match := _SCOPE.match(scope):
            transformations, part = match.groups()
            return backward(part) if "transpose(" in transformations else part
    return None


def op_names(program: str) -> dict[str, str]:
    """Of a program in XLA's notation, the paths of scopes (see `part_of`) by its operations' names."""
    return dict(_INSTRUCTION.findall(program))


def module_of(program: str) -> str:
    """What a program in XLA's notation is called in traces."""
    module = _MODULE.search(program)
    assert module is not None, program[:200]
    return module[1]


def name_parts(trace: Path, program: str) -> None:
    """Add the plane of the parts to a trace (an `xplane.pb` of a CPU), from the program's text in XLA's notation."""
    serialized = trace.read_bytes()
    parts = {name: part for name, op_name in op_names(program).items() if (part := part_of(op_name))}
    spans = list(_spans(ProfileData.from_serialized_xspace(serialized), module_of(program), parts))
    # A trace is a list of planes, and lists in protocol buffers are joined by putting one after the other.
    trace.write_bytes(serialized + encode([_plane(spans)]))


def _spans(profile: ProfileData, module: str, parts: Mapping[str, str]) -> Iterator[Span]:
    """Operations in sequence, joined while they are of one part of one execution."""
    for plane in profile.planes:
        for line in plane.lines:
            span: Span | None = None
            execution: Any = None
            for event in sorted(line.events, key=lambda event: event.start_ns):
                stats = dict(event.stats)
                if stats.get("hlo_module") != module or (part := parts.get(str(stats.get("hlo_op")))) is None:
                    continue
                start, end = int(event.start_ns), int(event.end_ns)
                if span is not None and (part, stats["run_id"]) == (span.part, execution):
                    span = Span(span.thread, part, span.start, max(span.end, end))
                    continue
                if span is not None:
                    yield span
                span, execution = Span(line.name, part, start, end), stats["run_id"]
            if span is not None:
                yield span


def _plane(spans: list[Span]) -> Plane:
    """A row for each thread, by the order of their names."""
    threads = sorted({span.thread for span in spans})
    return Plane(
        PLANE,
        [
            Line(
                number,
                f"thread {number}",
                [Slice(span.part, span.start, span.end - span.start) for span in spans if span.thread == thread],
            )
            for number, thread in enumerate(threads, start=1)
        ],
    )
