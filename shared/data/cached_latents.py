"""What a VAE made of an image, as the bytes that a cache keeps of it: a safetensors file of one known layout.

`__metadata__` holds `sizes`, those of the image (see `shared.models.xl.Sizes`), and a CRC-32 of them and of all that
follows the header; then come `latent_mean` and `latent_std`. The header is the one that is written here, byte for byte,
or the sample is bad.

Axes: H W C of the latents.
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from shared.data.sample import BadSampleError
from shared.models.stored_dtypes import NUMPY_DTYPES, StoredDtype
from shared.models.xl import SIZES, Sizes
from shared.untrusted import parse_json
from shared.user_errors import UserError

_LENGTH_BYTES = 8
_LONGEST_HEADER = 4096  # bytes: ours has some 300
_SIZES = re.compile(rf"\d{{1,9}}( \d{{1,9}}){{{SIZES - 1}}}")


class Latents(NamedTuple):
    """Mean and standard deviation [H,W,C] of an image's latents, before they are scaled, and the image's sizes."""

    mean_HWC: npt.NDArray[Any]
    std_HWC: npt.NDArray[Any]
    sizes: Sizes


@dataclass(frozen=True)
class LatentsLayout:
    """The arrays of all samples of a cache are of this shape (H, W, C) and in this format."""

    shape: tuple[int, int, int]
    stored_dtype: StoredDtype

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy has it; uint16 stands for bfloat16."""
        return NUMPY_DTYPES[self.stored_dtype]


@dataclass(frozen=True)
class CachedImage:
    """An image that a VAE has encoded, not yet unpacked."""

    content: bytes
    layout: LatentsLayout

    def unpack(self) -> Latents:
        """Raises BadSampleError for anything but what `pack` writes in this layout."""
        digest, sizes = _metadata(self.content)
        header = _header(self.layout, digest, sizes)
        arrays = self.content[len(header) :]
        if not self.content.startswith(header) or len(arrays) != 2 * _bytes_of_array(self.layout):
            raise BadSampleError("its cached latents are not of the shape and format that the cache has")
        if _checksum(sizes, arrays) != digest:
            raise BadSampleError("its cached latents are damaged: their checksum is another one")
        mean_HWC, std_HWC = np.frombuffer(arrays, self.layout.dtype).reshape(2, *self.layout.shape)
        return Latents(mean_HWC, std_HWC, sizes)


def pack(latents: Latents, layout: LatentsLayout) -> bytes:
    """What `CachedImage.unpack` takes apart."""
    for array in (latents.mean_HWC, latents.std_HWC):
        assert array.shape == layout.shape
        assert array.dtype == layout.dtype
    arrays = b"".join(np.ascontiguousarray(array).tobytes() for array in (latents.mean_HWC, latents.std_HWC))
    return _header(layout, _checksum(latents.sizes, arrays), latents.sizes) + arrays


class _Metadata(TypedDict):
    crc32: str
    sizes: str


_Header = TypedDict("_Header", {"__metadata__": _Metadata})


def _metadata(content: bytes) -> tuple[str, Sizes]:
    """The digest and the sizes that a header tells; whether it is ours otherwise is not looked at."""
    length = min(int.from_bytes(content[:_LENGTH_BYTES], "little"), _LONGEST_HEADER)
    try:
        header: _Header = parse_json(
            content[_LENGTH_BYTES : _LENGTH_BYTES + length], _Header, where="the header of its cached latents", fix=""
        )
    except UserError as error:
        raise BadSampleError(str(error).strip()) from error
    told = header["__metadata__"]
    if not _SIZES.fullmatch(told["sizes"]):
        raise BadSampleError("the header of its cached latents tells no sizes of an image")
    height, width, top, left, target_height, target_width = map(int, told["sizes"].split(" "))
    return told["crc32"], (height, width, top, left, target_height, target_width)


def _checksum(sizes: Sizes, arrays: bytes) -> str:
    return f"{zlib.crc32(arrays, zlib.crc32(_as_text(sizes).encode())):08x}"


def _as_text(sizes: Sizes) -> str:
    return " ".join(map(str, sizes))


def _header(layout: LatentsLayout, digest: str, sizes: Sizes) -> bytes:
    """Its length, and JSON filled up to a multiple of 8 bytes, as safetensors has it."""
    size = _bytes_of_array(layout)
    entries = {
        name: {"dtype": layout.stored_dtype, "shape": list(layout.shape), "data_offsets": [start, start + size]}
        for name, start in (("latent_mean", 0), ("latent_std", size))
    }
    metadata = {"crc32": digest, "sizes": _as_text(sizes)}
    content = json.dumps({"__metadata__": metadata} | entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def _bytes_of_array(layout: LatentsLayout) -> int:
    return math.prod(layout.shape) * layout.dtype.itemsize
