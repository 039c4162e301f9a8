"""The bytes of a sample's latents: what safetensors reads, and nothing but what was written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from safetensors.numpy import load

from shared.data.cached_latents import CachedImage, Latents, LatentsLayout, pack
from shared.data.sample import BadSampleError
from shared.models.stored_dtypes import NUMPY_DTYPES, StoredDtype

_SIZES = (768, 1024, 0, 85, 512, 512)
_LAYOUT = LatentsLayout((2, 3, 4), "F32")


def _latents(layout: LatentsLayout = _LAYOUT) -> Latents:
    values = np.arange(2 * np.prod(layout.shape), dtype=np.float32).reshape(2, *layout.shape).astype(layout.dtype)
    return Latents(values[0], values[1], _SIZES)


@given(
    st.sampled_from(sorted(NUMPY_DTYPES)),
    stn.array_shapes(min_dims=3, max_dims=3, max_side=5),
    st.tuples(*[st.integers(0, 10**9 - 1)] * 6),
    st.data(),
)
def test_what_is_packed_is_unpacked_bit_for_bit(
    dtype: StoredDtype,
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    data: st.DataObject,
) -> None:
    layout = LatentsLayout(shape, dtype)
    bits = np.dtype(f"u{layout.dtype.itemsize}")
    mean, std = (data.draw(stn.arrays(bits, shape)) for _ in range(2))
    given_ = Latents(mean.view(layout.dtype), std.view(layout.dtype), sizes)
    unpacked = CachedImage(pack(given_, layout), layout).unpack()
    np.testing.assert_array_equal(unpacked.mean_HWC.view(bits), mean)
    np.testing.assert_array_equal(unpacked.std_HWC.view(bits), std)
    assert unpacked.sizes == sizes


def test_safetensors_reads_the_same() -> None:
    expected = _latents()
    tensors = load(pack(expected, _LAYOUT))
    np.testing.assert_array_equal(tensors["latent_mean"], expected.mean_HWC)
    np.testing.assert_array_equal(tensors["latent_std"], expected.std_HWC)


def test_any_flipped_bit_is_noticed() -> None:
    content = pack(_latents(), _LAYOUT)
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(BadSampleError):
            CachedImage(bytes(damaged), _LAYOUT).unpack()


@given(st.binary(max_size=400), st.integers(0, 400))
def test_other_bytes_are_bad_samples(content: bytes, cut: int) -> None:
    for bad in (content, pack(_latents(), _LAYOUT)[:cut]):
        with pytest.raises(BadSampleError):
            CachedImage(bad, _LAYOUT).unpack()


def test_latents_of_another_layout_are_bad_samples() -> None:
    content = pack(_latents(), _LAYOUT)
    for other in (LatentsLayout((2, 3, 4), "F16"), LatentsLayout((3, 2, 4), "F32"), LatentsLayout((2, 3, 5), "F32")):
        with pytest.raises(BadSampleError, match="shape and format"):
            CachedImage(content, other).unpack()
