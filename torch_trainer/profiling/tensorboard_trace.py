"""A trace of torch.profiler for TensorBoard's Profile tab, with the parts of the model as a device of their own."""

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from shared.outgoing.atomic_files import write_atomically
from shared.profiling.parts import PLANE
from shared.profiling.xspace import Line, Plane, Slice, encode
from torch_trainer.profiling.kineto import Event, Lane, Trace
from torch_trainer.profiling.work import spans_of, work_in


def write_for_tensorboard(trace: Trace, folder: Path) -> Path:
    """Write a trace to where TensorBoard looks for profiles under `folder`; returns the file.

    Raises:
        OSError: it cannot be written.
    """
    moment = time.strftime("%Y_%m_%d_%H_%M_%S")
    file = folder / "plugins" / "profile" / moment / f"{socket.gethostname()}.xplane.pb"
    content = encode(planes_of(trace))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda temporary: temporary.write_bytes(content))
    return file


def planes_of(trace: Trace) -> Iterator[Plane]:
    """The host's threads, the parts of the model in what the devices did, and the streams of every device."""
    yield Plane("/host:CPU", _lines(trace.host, lambda lane: trace.thread_names.get(lane, f"thread {lane.number}")))
    yield Plane(PLANE, _parts(trace))
    for device, events in groupby(sorted(trace.devices, key=_device), _device):
        # Beside planes of the name /device:GPU:0, xprof shows no others, and so not the parts.
        yield Plane(f"/device:CUSTOM:GPU {device}", _lines(events, lambda lane: f"stream {lane.number}"))


def _parts(trace: Trace) -> list[Line]:
    of_devices = bool(trace.devices)
    return [
        Line(
            row,
            f"GPU {lane.of} stream {lane.number}" if of_devices else f"thread {row}",
            [Slice(span.part, span.start, span.end - span.start) for span in spans],
        )
        for row, (lane, spans) in enumerate(groupby(spans_of(work_in(trace)), lambda span: span.lane), start=1)
    ]


def _lines(events: Iterable[Event], name: Callable[[Lane], str]) -> list[Line]:
    by_lane = groupby(sorted(events, key=lambda event: event.lane), lambda event: event.lane)  # keeps their order
    return [
        Line(row, name(lane), [Slice(event.name, event.start, event.duration) for event in pieces])
        for row, (lane, pieces) in enumerate(by_lane, start=1)
    ]


def _device(event: Event) -> int:
    return event.lane.of
