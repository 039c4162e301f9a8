"""The ways to compute a convolution: as XLA does, or in forms that fill a TPU better; results differ by rounding alone.

Axes: B batch, H height, W width (of pixels or blocks of them), C input channels, O output channels, Q P the kernel's
width and height, N neighbours, K R pixels along the side of an input and an output block.

A TPU's registers and multipliers hold 8 or 16 rows of 128 lanes. XLA puts channels into the lanes and images into the
rows, so it wants 128 channels or more, and 8 images or more. Fewer images it cuts into strips, whose edges it copies
to one another before every convolution. And the gradient of a convolution with a stride it computes with the zeros
that lie between the numbers. Figures: docs/benchmarks.md, "Convolutions on a TPU v4".
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

CONVOLUTION = "convolution"  # the name under which results are given to `checkpoint_name`
ENOUGH_IMAGES = 8  # per device, for XLA's own form to be the faster one
KERNEL_SIZE = 3  # of the kernels that convolve blocks
NEIGHBOURS = 3  # which the ones of that size read: the block before, the block itself and the block after

_ROW_MAJOR = Layout((0, 1, 2, 3))

Kept = tuple[jax.Array | None, jax.Array | None]


def convolve(
    x_BHWC: jax.Array, weight_QPCO: jax.Array, stride: int, padding: tuple[int, int], *, for_tpu: bool
) -> jax.Array:
    """A 2-D convolution without a bias.

    Args:
        x_BHWC, weight_QPCO: two arrays of one floating dtype.
        stride: of both directions.
        padding: zeros (before, after) in both directions.
        for_tpu: in the forms that suit a TPU; other devices are slower with them.
    Returns:
        [B, H', W', O] in that dtype, summed in float32.
    """
    few_images = has_few_images(x_BHWC)
    form = _Form(x_BHWC.shape, weight_QPCO.shape, stride, padding, few_images)
    if not for_tpu:
        y_BHWO = _padded_alike(x_BHWC, weight_QPCO, form)
    elif few_images or stride > 1:
        y_BHWO = _by_columns(x_BHWC, weight_QPCO, form)
    else:
        y_BHWO = _as_xla_does(x_BHWC, weight_QPCO, form, "WHIO")
    return checkpoint_name(y_BHWO, CONVOLUTION)


def has_few_images(x_BHWC: jax.Array) -> bool:
    """Whether the devices get fewer images each than XLA's form wants."""
    return x_BHWC.shape[0] < ENOUGH_IMAGES * _devices()


def _devices() -> int:
    """Among which XLA divides what is computed. A function that is mapped over devices sees the rows of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size if mesh.auto_axes else 1


class _Form(NamedTuple):
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: int
    padding: tuple[int, int]
    few_images: bool


def _as_xla_does(x_BHWC: jax.Array, weight: jax.Array, form: _Form, axes: str) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWC,
        weight,
        window_strides=(form.stride, form.stride),
        padding=[form.padding] * 2,
        dimension_numbers=("NHWC", axes, "NHWC"),
    )


def _needed_by_gradients(x: Any, weight: Any) -> Kept:
    """Of those that are asked for: frozen weights have none."""
    return x.value if weight.perturbed else None, weight.value if x.perturbed else None


# --- off TPUs --------------------------------------------------------------------------------------------------------
# Inside a loop (accumulated slices, the steps of a sampler) XLA's compiler for CPUs computes a convolution of other
# axes than NHWC and HWIO up to 8 times as slowly, gradients included, and without its optimisations up to 180 times
# (jax 0.10.2, 3×3 kernels, 16 channels, 64 px). Compilers for GPUs know gradients by their axes.
#
# cuDNN leaves a kernel's gradient as OHWI. XLA would put the transposition into the optimizer's update, which then goes
# through seven arrays in an order that is slow, and writes new ones, which are copied to the old. So it is done before,
# in 16 bits. Figures: docs/gpu_kernels.md.


def _padded_alike(x_BHWC: jax.Array, weight_QPCO: jax.Array, form: _Form) -> jax.Array:
    """With as much padding before as after, and results at the beginning that are then left out.

    cuDNN knows no other padding: XLA would write a padded copy of the input first.
    """
    before, after = form.padding
    if before >= after:
        return _off_tpus(x_BHWC, weight_QPCO, form)
    left_out = math.ceil((after - before) / form.stride)
    padding = before + left_out * form.stride
    y_BHWO = _off_tpus(x_BHWC, weight_QPCO, form._replace(padding=(padding, padding)))
    height, width = ((side + before + after - form.weight_shape[0]) // form.stride + 1 for side in form.x_shape[1:3])
    return y_BHWO[:, left_out : left_out + height, left_out : left_out + width]


@partial(jax.custom_vjp, nondiff_argnames=("form",))
def _off_tpus(x_BHWC: jax.Array, weight_QPCO: jax.Array, form: _Form) -> jax.Array:
    return _as_xla_does(x_BHWC, weight_QPCO.swapaxes(0, 1), form, "HWIO")


def _off_tpus_forward(x: Any, weight: Any, form: _Form) -> tuple[jax.Array, Kept]:
    return _off_tpus(x.value, weight.value, form), _needed_by_gradients(x, weight)


def _off_tpus_backward(form: _Form, kept: Kept, cotangent_BHWO: jax.Array) -> Kept:
    x_BHWC, weight_QPCO = kept

    def gradient(on_cpus: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array], factor: Any) -> Any:
        if factor is None:
            return None
        return jax.lax.platform_dependent(
            cotangent_BHWO, factor, cpu=partial(on_cpus, form=form), default=partial(elsewhere, form=form)
        )

    return (
        gradient(_input_gradient_on_cpus, _input_gradient, weight_QPCO),
        gradient(_weight_gradient_on_cpus, _weight_gradient, x_BHWC),
    )


_off_tpus.defvjp(_off_tpus_forward, _off_tpus_backward, symbolic_zeros=True)


def _input_gradient(cotangent_BHWO: jax.Array, weight_QPCO: jax.Array, form: _Form) -> jax.Array:
    x = jax.ShapeDtypeStruct(form.x_shape, cotangent_BHWO.dtype)
    weight_HWIO = weight_QPCO.swapaxes(0, 1)
    return jax.linear_transpose(lambda x: _as_xla_does(x, weight_HWIO, form, "HWIO"), x)(cotangent_BHWO)[0]


def _weight_gradient(cotangent_BHWO: jax.Array, x_BHWC: jax.Array, form: _Form) -> jax.Array:
    columns, rows, *channels = form.weight_shape
    weight = jax.ShapeDtypeStruct((rows, columns, *channels), cotangent_BHWO.dtype)
    transposed = jax.linear_transpose(lambda weight: _as_xla_does(x_BHWC, weight, form, "HWIO"), weight)
    gradient_QPCO = transposed(cotangent_BHWO)[0].swapaxes(0, 1)
    if _devices() > 1:  # XLA would gather it whole first (jax 0.10.2)
        return gradient_QPCO
    return jax.lax.optimization_barrier(with_layout_constraint(gradient_QPCO, _ROW_MAJOR))


def _input_gradient_on_cpus(cotangent_BHWO: jax.Array, weight_QPCO: jax.Array, form: _Form) -> jax.Array:
    """The convolution of the cotangent, with zeros between its numbers, and the kernel turned around."""
    kernel_size = form.weight_shape[0]
    before = kernel_size - 1 - form.padding[0]
    sides = zip(form.x_shape[1:3], cotangent_BHWO.shape[1:3], strict=True)
    return jax.lax.conv_general_dilated(
        cotangent_BHWO,
        jnp.flip(weight_QPCO.swapaxes(0, 1), (0, 1)).swapaxes(2, 3),
        window_strides=(1, 1),
        padding=[(before, side + kernel_size - 2 - (out - 1) * form.stride - before) for side, out in sides],
        lhs_dilation=(form.stride, form.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _weight_gradient_on_cpus(cotangent_BHWO: jax.Array, x_BHWC: jax.Array, form: _Form) -> jax.Array:
    """The convolution of the input and the cotangent over images in the place of channels."""
    kernel_size, before = form.weight_shape[0], form.padding[0]
    sides = zip(form.x_shape[1:3], cotangent_BHWO.shape[1:3], strict=True)
    gradient_CHWO = jax.lax.conv_general_dilated(
        x_BHWC.transpose(3, 1, 2, 0),
        cotangent_BHWO.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=[(before, (out - 1) * form.stride + kernel_size - side - before) for side, out in sides],
        rhs_dilation=(form.stride, form.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return gradient_CHWO.transpose(2, 1, 0, 3)


# --- on TPUs ---------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnames=("form",))
def _by_columns(x_BHWC: jax.Array, weight_QPCO: jax.Array, form: _Form) -> jax.Array:
    """As a sum over the kernel's columns: the gradients, and of few images the result."""
    if form.few_images:
        return _sum_over_columns(x_BHWC, weight_QPCO, form, jnp.float32).astype(x_BHWC.dtype)
    return _as_xla_does(x_BHWC, weight_QPCO, form, "WHIO")


def _forward(x: Any, weight: Any, form: _Form) -> tuple[jax.Array, Kept]:
    return _by_columns(x.value, weight.value, form), _needed_by_gradients(x, weight)


def _backward(form: _Form, kept: Kept, cotangent_BHWO: jax.Array) -> Kept:
    """Sums in the cotangent's dtype: JAX transposes no convolution whose result has another one than its factors."""
    x_BHWC, weight_QPCO = kept
    dtype = cotangent_BHWO.dtype

    def transposed(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
        return jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, dtype))(cotangent_BHWO)[0]

    return (
        None
        if weight_QPCO is None
        else transposed(lambda x: _sum_over_columns(x, weight_QPCO, form, dtype), form.x_shape),
        None
        if x_BHWC is None
        else transposed(lambda weight: _sum_over_columns(x_BHWC, weight, form, dtype), form.weight_shape),
    )


_by_columns.defvjp(_forward, _backward, symbolic_zeros=True)


def _sum_over_columns(x_BHWC: jax.Array, weight_QPCO: jax.Array, form: _Form, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The sum, over the kernel's columns, of convolutions along H, for which W is more images."""
    (batch, height, width, _), columns, stride = form.x_shape, form.weight_shape[0], form.stride
    out_width = (width + sum(form.padding) - columns) // stride + 1
    padded_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, 0), form.padding, (0, 0)))

    def convolved(column: int) -> jax.Array:
        read_BHWC = padded_BHWC[:, :, column : column + stride * (out_width - 1) + 1 : stride]
        return jax.lax.conv_general_dilated(
            read_BHWC.swapaxes(0, 1).reshape(height, batch * out_width, -1),
            weight_QPCO[column],
            window_strides=(stride,),
            padding=[form.padding],
            dimension_numbers=("HNC", "HIO", "HNC"),
            preferred_element_type=dtype,
        )

    y_HNO = reduce(jnp.add, map(convolved, range(columns)))
    return y_HNO.reshape(len(y_HNO), batch, out_width, -1).swapaxes(0, 1)


def to_blocks(x_BHWC: jax.Array, block: int) -> jax.Array:
    """[B, H, W, C] → [B, H/K, W/K, K·K·C]: blocks of K×K pixels, whose channels lie side by side in the lanes.

    Products with ones and zeros pick the pixels, exactly: a TPU takes many times as long to move them.
    """
    if block == 1:
        return x_BHWC
    batch, height, width, _ = x_BHWC.shape
    rows_KHY, columns_KWX = (jnp.asarray(_every(block, size), x_BHWC.dtype) for size in (height, width))
    exactly = jax.lax.Precision.DEFAULT if x_BHWC.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    x_BHKCX = jnp.einsum("byxc,khy->bhkcx", x_BHWC, rows_KHY, precision=exactly)
    x_BHWKKC = jnp.einsum("bhkcx,lwx->bhwklc", x_BHKCX, columns_KWX, precision=exactly)
    return x_BHWKKC.reshape(batch, height // block, width // block, -1)


def _every(block: int, size: int) -> np.ndarray:
    """[K, blocks, pixels], 1 where a pixel is number K of a block."""
    return np.eye(size, dtype=np.float32).reshape(size // block, block, size).swapaxes(0, 1)


def weight_for_blocks(weight_QPCO: jax.Array, stride: int, block: int) -> jax.Array:
    """The kernel that does to blocks what a 3×3 one with padding 1 does to pixels; it has stride 1 and padding 1.

    Its input blocks are K×K pixels, its output blocks R×R with R = K / stride: there are as many of them. Most of it
    is zeros, which cost less than empty lanes do.

    Returns:
        [3, 3, K·K·C, R·R·O], the neighbours along W first.
    """
    *sides, channels, out_channels = weight_QPCO.shape
    assert sides == [KERNEL_SIZE, KERNEL_SIZE], sides
    side_NKRP = jnp.asarray(_pixels_read(stride, block), weight_QPCO.dtype)
    weight = jnp.einsum("nkrp,mlsq,qpco->mnklcrso", side_NKRP, side_NKRP, weight_QPCO)
    return weight.reshape(NEIGHBOURS, NEIGHBOURS, block**2 * channels, (block // stride) ** 2 * out_channels)


def _pixels_read(stride: int, block: int) -> np.ndarray:
    """[N, K, R, P], 1 where an output block's pixel R reads pixel K of its neighbour N with the kernel's element P."""
    out_block = block // stride
    reads = np.zeros((NEIGHBOURS, block, out_block, KERNEL_SIZE), np.float32)
    for pixel in range(out_block):
        for element in range(KERNEL_SIZE):
            position = block + stride * pixel + element - 1  # counted from the first pixel of the block before
            reads[position // block, position % block, pixel, element] = 1
    return reads
