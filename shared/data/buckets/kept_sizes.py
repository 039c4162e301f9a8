"""The sizes of a run's pictures, kept in its folder: a run that goes on looks at no picture again.

The file holds SHA-256 of what the source's manifest tells, in hexadecimal, then int32 [N,2], little-endian.

Axes: N samples.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.data.sources.base import Manifest
from shared.outgoing.atomic_files import write_atomically
from shared.untrusted import read_file, shown

logger = logging.getLogger(__name__)

KEPT_SIZES = "picture_sizes"

_DTYPE = np.dtype("<i4")
_KEY_BYTES = 64


def read_kept_sizes(folder: Path, manifest: Manifest, count: int) -> npt.NDArray[np.int32] | None:
    """int32 [N,2], width and height of each of `count` pictures; None where none are kept, or those of other data.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / KEPT_SIZES
    if not os.path.isfile(path):
        return None
    size = _KEY_BYTES + 2 * count * _DTYPE.itemsize
    content = read_file(path, size) if os.path.getsize(path) == size else b""
    if len(content) != size or content[:_KEY_BYTES] != _key(manifest):
        logger.info("%s is of other data, and is made anew", shown(path))
        return None
    return np.frombuffer(content, _DTYPE, offset=_KEY_BYTES).reshape(count, 2).astype(np.int32)


def keep_sizes(folder: Path, manifest: Manifest, sizes_N2: npt.NDArray[np.int32]) -> None:
    """Raises OSError where they cannot be written."""
    content = _key(manifest) + sizes_N2.astype(_DTYPE).tobytes()
    write_atomically(folder / KEPT_SIZES, lambda temporary: temporary.write_bytes(content))


def _key(manifest: Manifest) -> bytes:
    """Data of a known fingerprint are the same wherever they lie."""
    unimportant = () if manifest.get("fingerprint") is None else ("location",)
    told = {name: value for name, value in manifest.items() if name not in unimportant}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest().encode()
