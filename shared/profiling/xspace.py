"""Writes a profile as TensorBoard's Profile tab reads it: an XSpace (tsl/profiler/protobuf/xplane.proto).

Protocol buffers are simple on the wire (https://protobuf.dev/programming-guides/encoding), and of this message a few
fields are enough, so neither a compiled schema nor the library is needed to write one.
"""

from collections.abc import Iterable
from typing import NamedTuple

_LENGTH_DELIMITED = 2


class Slice(NamedTuple):
    """An event of a line; nanoseconds."""

    name: str
    start: int
    duration: int


class Line(NamedTuple):
    """A row of the trace viewer. `number` distinguishes the rows of a plane, and orders them."""

    number: int
    name: str
    slices: Iterable[Slice]


class Plane(NamedTuple):
    """A host or a device: xprof shows "/host:CPU", and what is called "/device:CUSTOM:…", as they are."""

    name: str
    lines: Iterable[Line]


def encode(planes: Iterable[Plane]) -> bytes:
    """The XSpace of these planes, numbered: xprof draws custom ones of one number as one."""
    return b"".join(_field(1, _plane(number, plane)) for number, plane in enumerate(planes))


def _plane(number: int, plane: Plane) -> bytes:
    numbers: dict[str, int] = {}
    lines = b"".join(_field(3, _line(line, numbers)) for line in plane.lines)
    metadata = b"".join(_field(4, _map_entry(key, name)) for name, key in numbers.items())
    return _integer(1, number) + _field(2, plane.name.encode()) + lines + metadata


def _line(line: Line, numbers: dict[str, int]) -> bytes:
    """`numbers` are those of the plane's names so far, and get what this line adds."""
    slices = b"".join(_field(4, _event(piece, numbers)) for piece in line.slices)
    return _integer(1, line.number) + _field(2, line.name.encode()) + slices


def _event(piece: Slice, numbers: dict[str, int]) -> bytes:
    number = numbers.setdefault(piece.name, len(numbers) + 1)
    return _integer(1, number) + _integer(2, piece.start * 1000) + _integer(3, piece.duration * 1000)  # picoseconds


def _map_entry(key: int, name: str) -> bytes:
    """Of `map<int64, XEventMetadata>`."""
    return _integer(1, key) + _field(2, _integer(1, key) + _field(2, name.encode()))


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    """A string or a message."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits in each byte, the lowest first; the highest bit says that there are more. Not for negative numbers."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
