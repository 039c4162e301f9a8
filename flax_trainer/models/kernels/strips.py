"""Feature maps cut into upright strips, so that few images fill a TPU's rows as many do (see `convolution.py`).

Axes: B batch, S strips from left to right, H height, W width (of a strip, where there is an axis S), C input channels,
O output channels, Q P a kernel's width and height.

Nothing is copied between strips but, of a convolution, what their neighbours add to the outermost columns.
"""

import jax
import jax.numpy as jnp

STRIPS = 8  # of an image; so many rows a TPU's registers have
STRIPS_NDIM = 5  # of a feature map in strips


def to_strips(x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, C] → [B, S, H, W / S, C]."""
    batch, height, width, channels = x_BHWC.shape
    return x_BHWC.reshape(batch, height, STRIPS, width // STRIPS, channels).swapaxes(1, 2)


def from_strips(x_BSHWC: jax.Array) -> jax.Array:
    """[B, S, H, W, C] → [B, H, S · W, C]."""
    batch, strips, height, width, channels = x_BSHWC.shape
    return x_BSHWC.swapaxes(1, 2).reshape(batch, height, strips * width, channels)


def convolve_strips(x_BSHWC: jax.Array, weight_QPCO: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """The strips of the convolution of a whole feature map.

    Args:
        x_BSHWC, weight_QPCO: two arrays of one floating dtype; the kernel 3×3, or 1×1 and without padding.
        stride: of both directions; it divides W.
        padding: zeros (before, after) in both directions, at most 1 each.
    Returns:
        [B, S, H', W', O] in that dtype. The sums of the outermost columns of a strip are rounded in two parts.
    """
    batch, strips, *_ = x_BSHWC.shape
    y_NHWO = jax.lax.conv_general_dilated(
        x_BSHWC.reshape(batch * strips, *x_BSHWC.shape[2:]),
        weight_QPCO,
        window_strides=(stride, stride),
        padding=[padding] * 2,
        dimension_numbers=("NHWC", "WHIO", "NHWC"),
    )
    y_BSHWO = y_NHWO.reshape(batch, strips, *y_NHWO.shape[1:])
    rest = y_BSHWO.shape[3] - 1  # columns that a neighbour adds nothing to
    last_read = stride * rest + weight_QPCO.shape[0] - 1 - padding[0]
    if padding[0]:
        last_BSHC = jnp.pad(x_BSHWC[:, :-1, :, -1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        y_BSHWO += _widened(_column(last_BSHC, weight_QPCO[0], stride, padding), 0, rest)
    if last_read == x_BSHWC.shape[3]:
        first_BSHC = jnp.pad(x_BSHWC[:, 1:, :, 0], ((0, 0), (0, 1), (0, 0), (0, 0)))
        y_BSHWO += _widened(_column(first_BSHC, weight_QPCO[-1], stride, padding), rest, 0)
    return y_BSHWO


def _column(x_BSHC: jax.Array, weight_PCO: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """What one column of the kernel makes of one column of x, a neighbour's: [B, S, H', O]."""
    batch, strips, *_ = x_BSHC.shape
    y_NHO = jax.lax.conv_general_dilated(
        x_BSHC.reshape(batch * strips, *x_BSHC.shape[2:]),
        weight_PCO,
        window_strides=(stride,),
        padding=[padding],
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return y_NHO.reshape(batch, strips, *y_NHO.shape[1:])


def _widened(column_BSHO: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(column_BSHO[:, :, :, None], ((0, 0), (0, 0), (0, 0), (before, after), (0, 0)))
