"""What the devices did in a trace, each piece of it with its part of the model and its kind.

The parts of a forward pass are the ranges that `torch.profiler.record_function` names in `torch_trainer.training.step`.
What autograd calls belongs to the part of the operation that it differentiates, whose sequence number and thread it
has, and a kernel to whatever started it. So it is in compiled models too: torch.compile makes of a graph one operation
with one backward, whatever is fused in them.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from shared.profiling.kinds import Kind, kind_of_kernel
from shared.profiling.parts import PARTS, backward
from torch_trainer.profiling.kinds import WHOLE, kind_of_operation
from torch_trainer.profiling.kineto import ANNOTATION, OPERATION, Event, Lane, Trace


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, a copy, or an operation of a CPU. Times in nanoseconds from the trace's first event on.

    `busy` is how long it took without what it called, `part` None outside of all parts.
    """

    name: str
    lane: Lane
    start: int
    end: int
    busy: int
    part: str | None
    kind: Kind


class Span(NamedTuple):
    """Work of one part that follows each other on a lane; times as in `Work`."""

    lane: Lane
    part: str
    start: int
    end: int


def work_in(trace: Trace) -> list[Work]:
    """What the accelerators did, or where there are none, the CPU; in the order of its beginning."""
    host = _Host(trace.host)
    return [host.started(event) for event in trace.devices] if trace.devices else list(host.work())


def spans_of(work: list[Work]) -> list[Span]:
    """What follows each other on a lane and is of one part, joined."""
    open_spans: dict[Lane, Span | None] = {}
    spans: list[Span] = []
    for piece in work:
        span = open_spans.get(piece.lane)
        if span is not None and span.part == piece.part:
            open_spans[piece.lane] = span._replace(end=max(span.end, piece.end))
            continue
        if span is not None:
            spans.append(span)
        new = None if piece.part is None else Span(piece.lane, piece.part, piece.start, piece.end)
        open_spans[piece.lane] = new
    spans += [span for span in open_spans.values() if span is not None]
    return sorted(spans, key=lambda span: (span.lane, span.start))


class _Host:
    """The host's events, with what each is called by, its part and its kind."""

    def __init__(self, events: list[Event]):
        self._events = events
        self._parents = _parents(events)
        self._parts = _parts(events, self._parents)
        self._kinds = self._kinds_of_all()
        self._launches = {
            event.args["correlation"]: index for index, event in enumerate(events) if "correlation" in event.args
        }
        self._operations = {
            event.args["External id"]: index
            for index, event in enumerate(events)
            if event.category == OPERATION and "External id" in event.args
        }

    def started(self, event: Event) -> Work:
        """An event of a device."""
        index = self._starting(event)
        part, of_operation = (None, None) if index is None else (self._parts[index], self._kinds[index])
        return _work(event, event.duration, part, _kind(kind_of_kernel(event.name), of_operation))

    def _starting(self, event: Event) -> int | None:
        """What started it: the call of the same correlation, which lies in the operation, or else the operation itself.

        Of a thread that Kineto knows no operations of, the calls lie in none.
        """
        call = self._launches.get(event.args.get("correlation"))
        if call is not None and self._parents[call] is not None:
            return call
        return self._operations.get(event.args.get("External id"), call)

    def work(self) -> Iterator[Work]:
        """The operations themselves."""
        called = [0] * len(self._events)
        for event, parent in zip(self._events, self._parents, strict=True):
            if parent is not None:
                called[parent] += event.duration
        for event, inside, part, kind in zip(self._events, called, self._parts, self._kinds, strict=True):
            if event.category == OPERATION:
                yield _work(event, max(0, event.duration - inside), part, kind)

    def _kinds_of_all(self) -> list[Kind]:
        kinds: list[Kind] = []
        for event, parent in zip(self._events, self._parents, strict=True):
            outer = "other" if parent is None else kinds[parent]
            is_operation = event.category == OPERATION
            kinds.append(outer if outer in WHOLE or not is_operation else kind_of_operation(event.name))
        return kinds


def _kind(of_kernel: Kind | None, of_operation: Kind | None) -> Kind:
    """A kernel's name says best what it does; but convolutions and attention, too, are made of matrix products."""
    if of_kernel is None or (of_kernel == "matrix products" and of_operation in WHOLE):
        return of_operation or "other"
    return of_kernel


def _work(event: Event, busy: int, part: str | None, kind: Kind) -> Work:
    kind = "optimizer" if part == "optimizer" else kind
    return Work(event.name, event.lane, event.start, event.end, busy, part, kind)


def _parents(events: list[Event]) -> list[int | None]:
    """Of each event the innermost one that it lies in, on the same thread."""
    parents: list[int | None] = []
    stacks: dict[Lane, list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        stack = stacks[event.lane]
        while stack and events[stack[-1]].end <= event.start:
            stack.pop()
        parents.append(stack[-1] if stack else None)
        stack.append(index)
    return parents


def _parts(events: list[Event], parents: list[int | None]) -> list[str | None]:
    """The part of every event. A forward pass begins before its backward pass, so one pass over all is enough."""
    parts: list[str | None] = []
    threads = _forward_threads(events)
    forward: dict[tuple[Lane, int], str | None] = {}
    before: dict[Lane, str | None] = {}  # of the operation of autograd that came before on the thread
    for event, parent in zip(events, parents, strict=True):
        part = None if parent is None else parts[parent]
        if event.category == ANNOTATION and event.name in PARTS:
            part = event.name
        elif _is_autograds(event):
            differentiated = forward.get((threads[_forward_thread(event)], event.args["Sequence number"]))
            part = part if differentiated is None else backward(differentiated)
            before[event.lane] = part
        elif part is None and "AccumulateGrad" in event.name:  # which differentiates nothing
            part = before.get(event.lane)
        elif _is_forward(event):
            # Of several operations with one number, the last is the one that autograd differentiates.
            forward[event.lane, event.args["Sequence number"]] = part
        parts.append(part)
    return parts


def _forward_threads(events: list[Event]) -> dict[int, Lane]:
    """The threads that autograd names by numbers of its own: each is where the operations are that it differentiates.

    Sequence numbers are counted by thread, and recomputing for gradient checkpointing counts too, on the thread of the
    backward pass.
    """
    differentiated: dict[int, set[int]] = defaultdict(set)
    of_thread: dict[Lane, set[int]] = defaultdict(set)
    for event in events:
        if _is_autograds(event):
            differentiated[_forward_thread(event)].add(event.args["Sequence number"])
        elif _is_forward(event):
            of_thread[event.lane].add(event.args["Sequence number"])
    nowhere = Lane(-1, -1)
    return {
        number: max(of_thread, key=lambda lane: len(of_thread[lane] & numbers), default=nowhere)
        for number, numbers in differentiated.items()
    }


def _is_autograds(event: Event) -> bool:
    return event.category == OPERATION and _forward_thread(event) > 0 and "Sequence number" in event.args


def _is_forward(event: Event) -> bool:
    return event.category == OPERATION and _forward_thread(event) == 0 and "Sequence number" in event.args


def _forward_thread(event: Event) -> int:
    return int(event.args.get("Fwd thread id", 0))
