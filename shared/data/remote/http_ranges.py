"""Ranges over HTTP, in fsspec's session: its own reading asks first with HEAD, which signed addresses refuse, does not
tell whether a range was honoured, and takes an answer of any length. Reference: RFC 9110, section 14.
"""

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

from shared.data.remote.faults import IgnoredRangeError, RemoteError, ShortReadError
from shared.data.remote.identity import Identity, Reading

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_CONNECTING, _SILENCE = 30.0, 60.0  # seconds
_BUFFER = 2**20
_IDENTITY_ENCODINGS = ("", "identity")
_HONOURED, _NOT_SATISFIABLE = 206, 416


class NoRangesError(Exception):
    """The server only answers with the whole object."""


def read_range(address: str, begin: int, end: int, reading: Reading, seconds: float) -> None:
    """Read what is still lacking of the bytes from `begin` to before `end`, or to the object's end.

    Args:
        address: of the object.
        begin: the first byte.
        end: the byte after the last.
        reading: what there is of them.
        seconds: after which to give up.

    Raises:
        NoRangesError: at the first time, the server does not honour ranges.
        RemoteError: the object has changed, or the answer is none to what was asked.
        Exception: whatever aiohttp raises.
    """
    file_system = _file_system()
    sync(file_system.loop, _read_range, file_system, address, begin, end, reading, seconds)


async def _read_range(
    file_system: HTTPFileSystem, address: str, begin: int, end: int, reading: Reading, seconds: float
) -> None:
    content = reading.content
    begin += len(content)
    headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    async with asyncio.timeout(seconds), _response(file_system, address, headers) as response:
        if response.status == _NOT_SATISFIABLE and reading.identity is None and begin == 0:
            reading.identity = Identity(0, _version_of(response))
            return
        response.raise_for_status()
        length, reading.identity = _honoured(response, begin, end, reading.identity)
        wanted = len(content) + length
        async for part in response.content.iter_any():
            content += part[: wanted - len(content)]
            if len(content) == wanted:
                break
        if len(content) < wanted or begin + length < min(end, reading.identity.size):
            raise ShortReadError


def _honoured(response: Any, begin: int, end: int, known: Identity | None) -> tuple[int, Identity]:
    """How many bytes the answer has of the range, and of which object."""
    encoded = response.headers.get("Content-Encoding", "").lower() not in _IDENTITY_ENCODINGS
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != _HONOURED or encoded or found is None:
        raise NoRangesError if known is None else IgnoredRangeError
    first, last, size = map(int, found.groups())
    if first != begin or not begin <= last < min(end, size):
        raise RemoteError(f"the server answers with bytes {first} to {last} where {begin} to {end - 1} were asked for")
    identity = Identity(size, _version_of(response))
    if known is not None:
        known.check(identity)
    return last - first + 1, identity


class HttpStream:
    """An object of a server without ranges, from front to back. After a fault it is opened again, and what was read is
    skipped. Used by one thread at a time."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._file_system = _file_system()
        self._position = 0
        self._version: str | None = None
        self._response: Any = None
        self._parts: AsyncIterator[bytes] | None = None

    def append(self, count: int, content: bytearray, seconds: float) -> None:
        """Append some `count` bytes or more, fewer only at the end.

        Raises:
            RemoteError: the object has changed.
            Exception: whatever aiohttp raises; the next call opens the object again.
        """
        sync(self._file_system.loop, self._append, count, content, seconds)

    def close(self) -> None:
        """Does not wait: the garbage collector may call it in any thread, the loop's own too."""
        self._file_system.loop.call_soon_threadsafe(self._close)

    async def _append(self, count: int, content: bytearray, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                parts = self._parts or await self._open()
                async for part in parts:
                    content += part
                    self._position += len(part)
                    if len(content) >= count:
                        break
        except BaseException:
            self._close()
            raise

    async def _open(self) -> AsyncIterator[bytes]:
        session = await self._file_system.set_session()
        self._response = await session.get(
            self._file_system.encode_url(self._address), read_bufsize=_BUFFER, headers={"Accept-Encoding": "identity"}
        )
        self._response.raise_for_status()
        if not _tells_its_end(self._response):
            raise RemoteError("its server does not tell where it ends, so that a broken connection would pass for that")
        version = _version_of(self._response)
        if self._position and version != self._version:
            raise RemoteError("it has changed while it was read")
        self._version = version
        self._parts = self._response.content.iter_any()
        skipped, rest = 0, b""
        while skipped < self._position:
            try:
                part = await anext(self._parts)
            except StopAsyncIteration:
                raise RemoteError("it has changed while it was read: it has become shorter") from None
            rest = part[max(0, self._position - skipped) :]
            skipped += len(part)
        self._parts = _chained(rest, self._parts)
        return self._parts

    def _close(self) -> None:
        self._parts = None
        if self._response is not None:
            self._response.close()
            self._response = None


async def _chained(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for part in others:
        yield part


@asynccontextmanager
async def _response(file_system: HTTPFileSystem, address: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    session = await file_system.set_session()
    response = await session.get(file_system.encode_url(address), read_bufsize=_BUFFER, headers=headers)
    try:
        yield response
    except BaseException:
        response.close()  # with its connection: what it still brings is not waited for
        raise
    if response.content.at_eof():
        response.release()
    else:
        response.close()


def _file_system() -> HTTPFileSystem:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECTING, sock_read=_SILENCE)
    # Where there are no proxies, aiohttp would still ask threads for them at every request.
    proxied = bool(urllib.request.getproxies())
    return fsspec.filesystem("http", client_kwargs={"timeout": timeout, "trust_env": proxied})


def _tells_its_end(response: Any) -> bool:
    headers = response.headers
    return "Content-Length" in headers or "chunked" in headers.get("Transfer-Encoding", "").lower()


def _version_of(response: Any) -> str | None:
    return response.headers.get("ETag") or response.headers.get("Last-Modified")
