"""A trace as torch.profiler exports it: Kineto's JSON, in the Chrome trace event format.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format; what Kineto puts
into `args` is in `libkineto/src/output_json.cpp` (https://github.com/pytorch/kineto) and
`torch/csrc/profiler/collection.cpp`.
"""

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OPERATION = "cpu_op"
ANNOTATION = "user_annotation"  # of record_function

_ON_DEVICES = {"kernel", "gpu_memcpy", "gpu_memset"}
# The calls that start kernels are of cuda_runtime, cuda_driver, xpu_runtime, …
_ON_THE_HOST = re.compile(rf"{OPERATION}|{ANNOTATION}|\w+_(?:runtime|driver)")


class Lane(NamedTuple):
    """What events follow each other on: a thread of a process, or a stream of a device, by their numbers."""

    of: int
    number: int


@dataclass(frozen=True, slots=True)
class Event:
    """Times in nanoseconds from the trace's first event on."""

    name: str
    category: str
    lane: Lane
    start: int
    end: int
    args: Mapping[str, Any]

    @property
    def duration(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """Events of the host's threads and of the devices' streams, each in the order of their beginning.

    Where two begin together, the longer one comes first: events of a thread contain each other.
    """

    host: list[Event]
    devices: list[Event]
    thread_names: Mapping[Lane, str]


def read_trace(source: Path | Mapping[str, Any]) -> Trace:
    """Of the file that `torch.profiler.profile.export_chrome_trace` wrote (.json or .json.gz), or of its content."""
    events = (_content(source) if isinstance(source, Path) else source)["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    on_devices = [event for event in complete if event["cat"] in _ON_DEVICES]
    on_the_host = [event for event in complete if _ON_THE_HOST.fullmatch(event["cat"])]
    begin = min((event["ts"] for event in (*on_devices, *on_the_host)), default=0.0)
    names = {
        _lane(event): str(event["args"]["name"])
        for event in events
        if event.get("name") == "thread_name" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
    }
    return Trace(_events(on_the_host, begin), _events(on_devices, begin), names)


def _content(file: Path) -> Mapping[str, Any]:
    content = file.read_bytes()
    return json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)


def _events(events: Iterable[Mapping[str, Any]], begin: float) -> list[Event]:
    """Kineto tells times in microseconds, with three decimals."""
    found = (
        Event(
            event["name"],
            event["cat"],
            _lane(event),
            start=round((event["ts"] - begin) * 1e3),
            end=round((event["ts"] + event.get("dur", 0) - begin) * 1e3),
            args=event.get("args", {}),
        )
        for event in events
    )
    return sorted(found, key=lambda event: (event.start, -event.end))


def _lane(event: Mapping[str, Any]) -> Lane:
    return Lane(int(event["pid"]), int(event["tid"]))
