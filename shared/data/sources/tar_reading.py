"""The regular files of a tar, front to back, from a file or a stream.

tarfile itself reads the headers, but follows what they say: to a header extension of a terabyte, through a chain of
extensions as deep as the tar is long, into expressions that take the square of a header's length. Here each is bounded.
Reference: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Protocol, cast

from shared.data.remote import RemoteError
from shared.untrusted import MIB, foreign_library, shown

_LARGEST_EXTENSION = MIB  # a name has 4096 bytes at most; the rest are extended attributes of some kilobytes
_MOST_EXTENSIONS = 16  # of one member, which has a name, a link's name and a set of attributes, or two
_CHUNK = MIB

_LARGEST_PADDING = 16 * MIB  # after the end; tar fills up to 10 KiB, unless it is told otherwise

_UNBOUNDED = 1024 * MIB
_MOST_EXPANSION = 100  # beyond that many bytes. Pictures are packed already; gzip makes 1000 bytes of zeros into one.

_ENCODING, _ERRORS = "utf-8", "surrogateescape"
_LONG_NAME, _LONG_LINK, _GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class DamagedTarError(Exception):
    """The message is the reason, a part of a sentence that names the tar, without anything that may be secret."""


class EndsTooEarlyError(DamagedTarError):
    """The content ends before what its headers claim: a copy or a download that was cut off."""

    def __init__(self, where: str = "") -> None:
        super().__init__(f"it ends too early{where}, as if its copying or its download had been cut off")


class Content(Protocol):
    """Where a tar's bytes come from."""

    position: int

    def read(self, count: int) -> bytes:
        """The next bytes, fewer only at the end. Raises DamagedTarError where they cannot be read."""
        ...

    def skip_to(self, position: int) -> None:
        """Go forward. EndsTooEarlyError where the content ends before, DamagedTarError where it cannot be read."""
        ...


class FileContent:
    """Of an open file, through positioned reads."""

    def __init__(self, descriptor: int) -> None:
        self.position = 0
        self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size

    def read(self, count: int) -> bytes:
        try:
            content = read_at(self._descriptor, self.position, count)
        except OSError as error:
            raise DamagedTarError(error.strerror or type(error).__name__) from error
        self.position += len(content)
        return content

    def skip_to(self, position: int) -> None:
        if position > self._size:
            raise EndsTooEarlyError
        self.position = position


class StreamContent:
    """Of a stream that may be packed by gzip, bzip2 or xz, unpacked within bounds.

    A RemoteError of the stream passes through.
    """

    def __init__(self, stream: Any) -> None:
        self.position = 0
        self._packed = _Counted(stream)
        self._unpacked: IO[bytes] | None = None

    def read(self, count: int) -> bytes:
        content = bytearray()
        while count > len(content) and (part := self._some(min(count - len(content), _CHUNK))):
            content += part
        return bytes(content)

    def skip_to(self, position: int) -> None:
        while self.position < position:
            if not self._some(min(position - self.position, _CHUNK)):
                raise EndsTooEarlyError

    def _some(self, count: int) -> bytes:
        try:
            with foreign_library("", ""):
                if self._unpacked is None:
                    self._unpacked = _unpacked(self._packed)
                part = self._unpacked.read(count)
        except ValueError as error:  # the reason may quote a command with a token in it
            if isinstance(error.__cause__, EOFError):  # of the unpackers
                raise EndsTooEarlyError from None
            if isinstance(error.__cause__, RemoteError):
                raise error.__cause__ from None
            raise DamagedTarError(type(error.__cause__).__name__) from None
        except MemoryError:
            raise DamagedTarError("unpacking it takes more memory than there is") from None
        self.position += len(part)
        if self.position > max(_UNBOUNDED, _MOST_EXPANSION * self._packed.count):
            raise DamagedTarError(f"it unpacks to more than {_MOST_EXPANSION} times its size, as no pictures do")
        return part


def regular_files(content: Content) -> Iterator[tuple[str, int]]:
    """(name, size) of each regular file. The content then stands at its first byte, and may be read up to its last.

    Raises:
        DamagedTarError: it is no tar, ends too early, or its headers are damaged or claim what no honest tar has.
    """
    where = ""
    try:
        while (member := _next_member(content)) is not None:
            where = f", in {shown(member.name)}"
            begin = content.position
            if member.isreg():
                yield member.name, member.size
            if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                content.skip_to(begin + _blocks(member.size))
            where = f", after {shown(member.name)}"
    except EndsTooEarlyError:
        raise EndsTooEarlyError(where) from None


def read_at(descriptor: int, position: int, count: int) -> bytes:
    """Positioned reads until all is there or the file ends; OSError where it cannot be read."""
    content = os.pread(descriptor, count, position)
    while len(content) < count and (part := os.pread(descriptor, count - len(content), position + len(content))):
        content += part
    return content


def _next_member(content: Content) -> tarfile.TarInfo | None:
    """The next header that is not itself about the next one, with what those say about it; None at the end."""
    name: str | None = None
    size: int | None = None
    for extensions in range(_MOST_EXTENSIONS):
        member = _header(content)
        if member is None:
            if extensions:  # of a member that is not there
                raise EndsTooEarlyError
            return None
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedTarError("it has sparse members; write it without them")
        if member.type == _LONG_NAME:
            name = name or _text(_extension(content, member).partition(b"\0")[0])
        elif member.type in _PAX:
            records = _pax_records(_extension(content, member))
            name = name or (_text(records[b"path"]).rstrip("/") if b"path" in records else None)
            size = _pax_size(records[b"size"]) if size is None and b"size" in records else size
        elif member.type in (_LONG_LINK, _GLOBAL):
            _extension(content, member)
        else:
            member.name = member.name if name is None else name
            member.size = member.size if size is None else size
            return member
    raise DamagedTarError(f"a member has more than {_MOST_EXTENSIONS} header extensions")


def _header(content: Content) -> tarfile.TarInfo | None:
    begin = content.position
    block = content.read(tarfile.BLOCKSIZE)
    if not block and begin == 0:
        raise DamagedTarError("it is empty")
    if not block.strip(b"\0"):  # the end; some programs cut its zeros short
        _check_nothing_follows(content, begin)
        return None
    if len(block) < tarfile.BLOCKSIZE and begin:
        raise EndsTooEarlyError
    try:
        with foreign_library("", ""):
            header = tarfile.TarInfo.frombuf(block, _ENCODING, _ERRORS)
    except ValueError:
        reason = f"the header at byte {begin} is damaged" if begin else "it does not begin as a tar does"
        raise DamagedTarError(reason) from None
    if header.size < 0:
        raise DamagedTarError(f"the header at byte {begin} claims {header.size} bytes")
    return header


def _check_nothing_follows(content: Content, end: int) -> None:
    """Where blocks were never written, or got lost, zeros stand in the middle, and all that follows would go unread."""
    while content.position - end <= _LARGEST_PADDING:
        part = content.read(_CHUNK)
        if part.strip(b"\0"):
            raise DamagedTarError(
                f"zeros at byte {end} end it, and more follows: a part of it was not written, or several tars are in "
                "one file"
            )
        if len(part) < _CHUNK:
            return
    raise DamagedTarError(f"zeros at byte {end} end it, and {_LARGEST_PADDING // MIB} MiB of them and more follow")


def _extension(content: Content, header: tarfile.TarInfo) -> bytes:
    if header.size > _LARGEST_EXTENSION:
        raise DamagedTarError(f"a header extension claims {header.size:,} bytes, more than any honest one")
    begin = content.position
    extension = content.read(header.size)
    content.skip_to(begin + _blocks(header.size))
    return extension


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Records of the form "LENGTH KEY=VALUE\\n", whose length counts all of it."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        space = content.find(b" ", position, position + 20)
        length = content[position : max(space, position)]
        end = position + (int(length) if length.isdigit() else 0)
        equals = content.find(b"=", space, end) if space > 0 else -1
        if not position < space < equals < end <= len(content):
            raise DamagedTarError("a header extension is damaged")
        records[content[space + 1 : equals]] = content[equals + 1 : end - 1]
        position = end
    if any(key.startswith(b"GNU.sparse.") for key in records):
        raise DamagedTarError("it has sparse members; write it without them")
    return records


def _pax_size(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise DamagedTarError("a header extension is damaged")
    return int(value)


def _text(name: bytes) -> str:
    return name.decode(_ENCODING, _ERRORS)


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Counted(io.RawIOBase):
    """A stream that has nothing but `read`, and how much was read of it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.count = 0
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        self.count += len(part)
        return len(part)


def _unpacked(packed: _Counted) -> IO[bytes]:
    """These readers, unlike tarfile's own, unpack no more at once than they are asked for."""
    buffered = io.BufferedReader(packed, _CHUNK)
    beginning = buffered.peek(10)
    if beginning.startswith(b"\x1f\x8b\x08"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if beginning.startswith(b"BZh") and beginning[4:10] == b"1AY&SY":
        return bz2.BZ2File(buffered)
    if beginning.startswith((b"\xfd7zXZ", b"\x5d\x00\x00\x80")):
        return lzma.LZMAFile(buffered)
    return buffered
