"""Pictures at the addresses that rows name: a list of schemes, read within bounds.

fsspec by itself also reads local files, runs ssh, and chains one file system onto another.
"""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import fsspec

from shared.data.sample import BadSampleError
from shared.outgoing.redaction import redacted
from shared.untrusted import foreign_library, open_file, shown
from shared.untrusted.pictures import LARGEST_FILE

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
}
"""The schemes that are read, each with the package that reads it."""

_SCHEME = re.compile(r"([^/\\]*)://")
_LOCAL_SCHEMES = ("file", "local")
_ZIP = re.compile(r"zip://(?P<inner>.*?)::(?P<archive>.*)", re.DOTALL)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks bz2 and LZMA without bound
_CHUNK = 2**20


def scheme_of(name: str) -> str | None:
    """The scheme of an address in lower case; None for a path, as which `file://` and `local://` addresses count."""
    found = _SCHEME.match(name)
    return found[1].lower() if found and found[1].lower() not in _LOCAL_SCHEMES else None


def local_path(name: str) -> str:
    """The path in a `file://` or `local://` address; any other name as it is. As in fsspec, nothing is unquoted."""
    scheme, separator, rest = name.partition("://")
    return rest if separator and scheme.lower() in _LOCAL_SCHEMES else name


def zip_parts(name: str) -> tuple[str, str] | None:
    """(member, archive) of `zip://MEMBER::ARCHIVE`, as datasets names pictures in a zip; None for other names."""
    found = _ZIP.fullmatch(name)
    return (found["inner"].lstrip("/"), found["archive"]) if found else None


def check_address(address: str) -> None:
    """Raises BadSampleError for an address that is not read, whatever answers there."""
    scheme = scheme_of(address)
    if scheme not in PACKAGES or "::" in address:
        raise BadSampleError(f"it names {described(address)}; expected a file or one of {', '.join(PACKAGES)}:")


def read_address(address: str) -> bytes:
    """What lies at an address: remote, or in a zip that `zip_parts` understands.

    Raises:
        BadSampleError: it is not of a scheme that is read, cannot be downloaded, or is larger than any picture.
    """
    if (parts := zip_parts(address)) is not None:
        return _read_zipped(address, *parts)
    check_address(address)
    with _refusals(address), fsspec.open(address, "rb") as file:
        return _read(cast(BinaryIO, file))


def described(address: str) -> str:
    """An address for a log line, without what may be secret in it."""
    return shown(redacted(address))


@contextmanager
def _refusals(address: str) -> Iterator[None]:
    """What libraries raise becomes a BadSampleError. Their messages may quote the address, and what is secret in it."""
    try:
        with foreign_library("", ""):
            yield
    except ValueError as error:
        raise BadSampleError(f"{described(address)} cannot be read: {_why(address, error.__cause__)}") from None


def _why(address: str, error: BaseException | None) -> str:
    if isinstance(error, BadSampleError):
        return str(error)
    parts = zip_parts(address)
    scheme = scheme_of(parts[1] if parts else address)
    if isinstance(error, ImportError) and scheme is not None:
        return f"{scheme}: needs a package that is not installed; pip install {PACKAGES[scheme]}"
    return type(error).__name__


def _read_zipped(address: str, inner: str, archive: str) -> bytes:
    remote = scheme_of(archive) is not None
    if remote:
        check_address(archive)
    with (
        _refusals(address),
        fsspec.open(archive, "rb") if remote else open_file(local_path(archive)) as file,
        zipfile.ZipFile(cast(BinaryIO, file)) as opened,
    ):
        if opened.getinfo(inner).compress_type not in _ZIP_METHODS:
            raise BadSampleError("it is packed by a method other than deflate")
        with opened.open(inner) as member:
            return _read(cast(BinaryIO, member))


def _read(file: BinaryIO) -> bytes:
    """The whole file; what is read without a known size comes in parts of any length."""
    content = bytearray()
    while part := file.read(_CHUNK):
        content += part
        if len(content) > LARGEST_FILE:
            raise BadSampleError(f"it has more than {LARGEST_FILE:,} bytes, more than any honest picture")
    return bytes(content)
