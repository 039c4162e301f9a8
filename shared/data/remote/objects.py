"""An object at an address, of which any range can be read, each through faults."""

import threading
from typing import Any

import fsspec

from shared.data.addresses import scheme_of
from shared.data.remote.faults import RemoteError, ShortReadError
from shared.data.remote.http_ranges import NoRangesError, read_range
from shared.data.remote.identity import Identity, Reading
from shared.data.remote.retrying import retried

_HTTP = ("http", "https")
_VERSIONS = ("ETag", "etag", "md5Hash", "md5", "generation", "blob_id", "last_modified", "LastModified", "mtime")
_opening_store = threading.Lock()  # fsspec's registry imports a store's package, which threads must not do together


class RemoteObject:
    """An object of known size. Safe to use from several threads.

    Attributes:
        address: where it lies.
        size: in bytes.
        beginning: its first bytes, as many as were asked for.
    """

    def __init__(self, address: str, identity: Identity, beginning: bytearray | None = None) -> None:
        self.address, self.size = address, identity.size
        self.beginning = bytearray() if beginning is None else beginning
        self._identity = identity

    def read(self, begin: int, end: int) -> bytearray:
        """The bytes from `begin` to before `end`, all of them.

        Raises:
            RemoteError: they cannot be read, or the object has changed since it was opened.
        """
        if not 0 <= begin <= end <= self.size:
            raise RemoteError(f"it has {self.size:,} bytes, and {begin:,} to {end:,} were asked for")
        return _read(self.address, begin, end, self._identity).content if begin < end else bytearray()

    def check_unchanged(self) -> None:
        """Raises RemoteError where another object lies there now. Over HTTP every range tells that by itself."""
        if scheme_of(self.address) not in _HTTP:
            self._identity.check(retried(self.address, lambda _: _identity_of(self.address)))


def open_object(address: str, beginning: int) -> RemoteObject | None:
    """The object at an address, with `beginning` bytes, which tell whether it is there and may be read.

    Returns:
        None for an object of an HTTP server that does not answer with ranges.

    Raises:
        RemoteError: it is not there, may not be read, or cannot be reached.
    """
    if scheme_of(address) in _HTTP:
        try:
            reading = _read(address, 0, beginning, None)
        except NoRangesError:
            return None
    else:
        identity = retried(address, lambda _: _identity_of(address))
        reading = _read(address, 0, min(beginning, identity.size), identity)
    assert reading.identity is not None
    return RemoteObject(address, reading.identity, reading.content)


def _read(address: str, begin: int, end: int, identity: Identity | None) -> Reading:
    reading = Reading(identity)

    def attempt(seconds: float) -> NoRangesError | None:
        if scheme_of(address) not in _HTTP:
            _read_from_store(address, begin, end, reading)
            return None
        try:
            read_range(address, begin, end, reading, seconds)
        except NoRangesError as error:  # which is no fault
            return error
        return None

    if (error := retried(address, attempt)) is not None:
        raise error
    return reading


def _read_from_store(address: str, begin: int, end: int, reading: Reading) -> None:
    file_system, path = _store(address)
    lacking = end - begin - len(reading.content)
    part = file_system.cat_file(path, start=end - lacking, end=end) if lacking else b""
    if len(part) > lacking:
        raise RemoteError("the store answers with more than it was asked for")
    reading.content += part
    if len(part) < lacking:
        raise ShortReadError


def _identity_of(address: str) -> Identity:
    file_system, path = _store(address)
    file_system.invalidate_cache(path)
    facts: dict[str, Any] = file_system.info(path)
    if facts.get("type") == "directory":
        raise IsADirectoryError
    size = facts.get("size")
    if not isinstance(size, int) or size < 0:
        raise RemoteError("the store does not tell its size")
    version = next((str(facts[name]) for name in _VERSIONS if facts.get(name) is not None), None)
    return Identity(size, version)


def _store(address: str) -> tuple[Any, str]:
    with _opening_store:
        return fsspec.url_to_fs(address)
