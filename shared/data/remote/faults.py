"""What goes wrong on the way to an object: which faults pass by themselves, and each as words without a secret.

Libraries' messages may quote an address with a signature in it, so none is shown.
"""

import http
from collections.abc import Iterator

import fsspec

from shared.data.addresses import PACKAGES, scheme_of

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_STATUS = (408, 425, 429)  # and all from 500 on
_ABSENT_STATUS = (401, 403, 404, 410)
# Of aiohttp, botocore, httpx and azure, whose classes are not imported: a store's package may not be installed.
_PASSING_KINDS = frozenset(
    {
        "ClientConnectionError",
        "ClientPayloadError",
        "HTTPClientError",
        "IncompleteReadError",
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
    }
)
_LASTING_KINDS = frozenset({"ClientSSLError", "SSLError", "ProxyConnectionError", "UnsupportedProtocol"})

_KINDS = {
    "ClientConnectorDNSError": "its host is not known",
    "ClientConnectorError": "its host cannot be reached",
    "ClientPayloadError": "the connection broke off",
    "EndpointConnectionError": "its host cannot be reached",
    "NoCredentialsError": "the store wants credentials, and there are none",
    "RedirectClientError": "it redirects to what is no address of the web",
    "ServerDisconnectedError": "the connection broke off",
    "TimeoutError": "no answer came in time",
}
"""In words; of others, the name is shown."""


class RemoteError(Exception):
    """The message is the reason, a part of a sentence that names the address, without anything that may be secret."""


class AbsentError(RemoteError):
    """It is not there, or may not be read: stores say the one for the other to whom they do not trust."""


class ShortReadError(OSError):
    """An answer ended before what it was to bring."""


class IgnoredRangeError(OSError):
    """A server that answers with ranges has once answered with the whole object."""


def passes(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, (RemoteError, *_LASTING)):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _LASTING_KINDS:
        return False
    status = _status_of(error)
    if status is not None:
        return status in _PASSING_STATUS or status >= 500
    return isinstance(error, OSError) or bool(kinds & _PASSING_KINDS)


def as_lasting(address: str, error: Exception) -> RemoteError:
    """An error that does not pass."""
    if isinstance(error, RemoteError):
        return error
    absent = isinstance(error, (FileNotFoundError, PermissionError)) or _status_of(error) in _ABSENT_STATUS
    return (AbsentError if absent else RemoteError)(reason_of(address, error))


def reason_of(address: str, error: Exception) -> str:
    """An error in words that may be shown."""
    if isinstance(error, RemoteError):
        return str(error)
    scheme = scheme_of(address) or ""
    if isinstance(error, ImportError) or scheme not in fsspec.available_protocols():
        return f"{scheme}: needs a package that is not installed; pip install {PACKAGES[scheme]}"
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, PermissionError):
        return "it may not be read from here"
    if isinstance(error, ShortReadError):
        return "the answer ends too early"
    if isinstance(error, IgnoredRangeError):
        return "the server answers with the whole object, not with the range that it was asked for"
    status = _status_of(error)
    if status is None:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return next((_KINDS[kind] for kind in kinds if kind in _KINDS), type(error).__name__)
    known = {entry.value: entry.phrase for entry in http.HTTPStatus}
    return f"HTTP {status} {known.get(status, '')}".strip()


def _status_of(error: Exception) -> int | None:
    """The HTTP status in an error of any of the libraries."""
    for status in _told_status(error):
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _told_status(error: Exception) -> Iterator[object]:
    yield getattr(error, "status", None)  # aiohttp
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        yield (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
    yield getattr(response, "status_code", None)  # httpx, requests
    yield getattr(error, "status_code", None)  # azure
    yield getattr(error, "code", None)  # gcsfs; deprecated in aiohttp
