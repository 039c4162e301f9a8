"""The ways to compute attention: plainly, or without ever holding the whole matrix of scores.

Axes: B batch, Q query positions, K key positions, N heads, D head features, S blocks of queries, P queries in a block.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from flax_trainer.models.kernels.flash_attention import fits_flash_attention, flash_attention

AttentionKernel = Literal["plain", "blockwise", "splash", "cudnn", "cudnn_sm90"]
Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of the query, the key and the value

SCORES_PER_BLOCK = 2**24  # 64 MiB in float32: an eighth of those of one 512 px image, 8 heads of 4096² positions
FEW_KEYS = 256  # a position then has no more scores than its feed-forward network has features; a caption has 77 keys

SPLASH_MIN_LENGTH = 1024  # shorter ones have few scores
SPLASH_LANES = 128  # lengths must be multiples of it
SPLASH_BLOCKS = (512, 384, 256, SPLASH_LANES)
# Of the keys whose gradients are computed at a time: each such block makes a part of the queries' gradients, which are
# added up afterwards. A TPU core's own 16 MiB hold a block of 4096 keys where a head has few bytes at one position (64
# features of 16 bits) and queries and keys come 256 at a time, and one of 2048 with twice as many bytes.
LARGEST_GRADIENT_BLOCK = 4096
LARGEST_GRADIENT_BLOCK_MAX_BYTES = 128
LARGEST_GRADIENT_BLOCK_ROWS = (256, SPLASH_LANES)
LARGE_GRADIENT_BLOCKS = (2048, 1536, 1024, 768, *SPLASH_BLOCKS)
LARGE_GRADIENT_BLOCKS_MAX_BYTES = 256
WITHOUT_SPLASH = ("TPU v2", "TPU v3")

# cuDNN's, by the least compute capability, the latest first, with the most features of a head that it takes. So JAX
# 0.10 and 0.11 have it, in jax/_src/cudnn/fused_attention_stablehlo.py; lengths have to be even, and features multiples
# of 8. An odd number of keys is made even by one that is masked.
CUDNN_KERNELS: dict[AttentionKernel, tuple[float, int]] = {"cudnn_sm90": (9.0, 256), "cudnn": (8.0, 128)}


def attention_kernel(asked_for: bool | None, device: jax.Device) -> AttentionKernel:
    """How attention is computed on a device (a real one, or one of a topology that is compiled for).

    Args:
        asked_for: `--enable_xformers_memory_efficient_attention`: None is the device's fused kernel, where it has one.
    """
    if asked_for is False:
        return "plain"
    return _fused_kernel(device) or ("blockwise" if asked_for else "plain")


def _fused_kernel(device: jax.Device) -> AttentionKernel | None:
    if device.platform == "tpu":
        return None if device.device_kind in WITHOUT_SPLASH else "splash"
    if device.platform == "gpu" and "NVIDIA" in device.device_kind:
        capability = float(device.compute_capability)
        return next((kernel for kernel, (least, _) in CUDNN_KERNELS.items() if capability >= least), None)
    return None


def dot_product_attention(
    query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, kernel: AttentionKernel = "plain"
) -> jax.Array:
    """softmax(QKᵀ/√D)V, every attention of the UNet, the ControlNet and the VAE (Vaswani et al. 2017, equation 1).

    Logits are accumulated and normalised in float32 whatever the inputs' dtype. A product of two bfloat16 or float16
    numbers is exact in float32, so this is also what a checkpoint's `upcast_attention` asks for: it needs no code.

    Args:
        query_BQND, key_BKND, value_BKND: three arrays of one floating dtype.
        kernel: how it is computed; results differ by rounding alone. "plain" keeps all scores for the backward pass.
            "blockwise" holds a block of them at a time, on any device; where keys are few, all until they are used.
            "splash" (TPU, by that kernel or our own) and "cudnn" and "cudnn_sm90" (NVIDIA) are fused kernels where
            lengths, dtype and head size allow them, and blockwise attention elsewhere.
    Returns:
        [B, Q, N, D] in that dtype.
    """
    with jax.named_scope("attention"):
        return _attention(query_BQND, key_BKND, value_BKND, kernel)


def _attention(query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, kernel: AttentionKernel) -> jax.Array:
    if kernel == "plain":
        return plain_attention(query_BQND, key_BKND, value_BKND)
    if kernel == "splash" and _fits_splash(query_BQND, key_BKND):
        return _on_each_device(flash_attention_tpu)(query_BQND, key_BKND, value_BKND)
    if kernel in CUDNN_KERNELS and _fits_cudnn(query_BQND, kernel):
        return _cudnn_attention(query_BQND, key_BKND, value_BKND)
    if key_BKND.shape[1] <= FEW_KEYS:
        return jax.checkpoint(plain_attention)(query_BQND, key_BKND, value_BKND)
    return blockwise_attention(query_BQND, key_BKND, value_BKND)


def _cudnn_attention(query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array) -> jax.Array:
    if key_BKND.shape[1] % 2 == 0:
        return jax.nn.dot_product_attention(query_BQND, key_BKND, value_BKND, implementation="cudnn")
    return _on_each_device(_with_a_masked_key)(query_BQND, key_BKND, value_BKND)


def _with_a_masked_key(query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array) -> jax.Array:
    batch, keys = key_BKND.shape[:2]
    key_BKND, value_BKND = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key_BKND, value_BKND))
    lengths_B = jnp.full(batch, keys, jnp.int32)
    return jax.nn.dot_product_attention(
        query_BQND, key_BKND, value_BKND, key_value_seq_lengths=lengths_B, implementation="cudnn"
    )


def plain_attention(
    query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, *, is_causal: bool = False
) -> jax.Array:
    """Attention with all scores at once; with `is_causal`, of each position to itself and those before it."""
    dtype = query_BQND.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        # JAX asks for products of float16 numbers, summed in float32, in a way that XLA compiles for GPUs alone.
        query_BQND, key_BKND, value_BKND = (x.astype(jnp.float32) for x in (query_BQND, key_BKND, value_BKND))
    y_BQND = jax.nn.dot_product_attention(query_BQND, key_BKND, value_BKND, is_causal=is_causal, implementation="xla")
    return y_BQND.astype(dtype)


def blockwise_attention(
    query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, *, scores_per_block: int = SCORES_PER_BLOCK
) -> jax.Array:
    """Attention of one block of queries after another, whose gradient recomputes each block's scores.

    The queries' half of Rabe & Staats 2021 (arXiv:2112.05682, section 3): a block sees all keys, so its softmax needs
    no correction. Memory is that of one block's scores, however many queries there are.

    Args:
        query_BQND, key_BKND, value_BKND: three arrays of one floating dtype.
        scores_per_block: the most scores, over all heads and images, that are held at a time; at least one query's.
    """
    batch, queries, heads, features = query_BQND.shape
    keys = key_BKND.shape[1]
    blocks = math.ceil(queries / max(1, scores_per_block // (batch * heads * keys)))
    if blocks == 1:
        return jax.checkpoint(plain_attention)(query_BQND, key_BKND, value_BKND)

    rows = math.ceil(queries / blocks)
    blocks = math.ceil(queries / rows)
    padded_BQND = jnp.pad(query_BQND, ((0, 0), (0, blocks * rows - queries), (0, 0), (0, 0)))
    query_SBPND = padded_BQND.reshape(batch, blocks, rows, heads, features).swapaxes(0, 1)
    # The forward and the backward pass are two loops, between which no compiler finds common subexpressions.
    attend = jax.checkpoint(lambda query_BPND: plain_attention(query_BPND, key_BKND, value_BKND), prevent_cse=False)
    y_SBPND = jax.lax.map(attend, query_SBPND)
    return y_SBPND.swapaxes(0, 1).reshape(padded_BQND.shape)[:, :queries]


@partial(jax.custom_vjp, nondiff_argnames=("interpret",))
def flash_attention_tpu(
    query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, interpret: bool = False
) -> jax.Array:
    """FlashAttention (Dao et al. 2022) as a Pallas kernel for TPUs.

    It is the one of `flash_attention.py` where a head's keys and values fit a core's own memory, and else JAX's, splash
    attention, without a mask.

    Products of bfloat16 numbers are exact and summed in float32; products of float32 numbers are float32's, whatever
    `jax_default_matmul_precision` says: the kernel's compiler has no other precisions.

    Args:
        query_BQND, key_BKND, value_BKND: three bfloat16 or float32 arrays, whose lengths are multiples of 128 or those
            that `fits_flash_attention` allows.
        interpret: run the kernel's operations one by one, on any device: for tests.
    """
    with _splash_precision(query_BQND.dtype):
        return _attend(query_BQND, key_BKND, value_BKND, interpret)


def _flash_forward(
    query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, interpret: bool
) -> tuple[jax.Array, Callable[[jax.Array], Gradients]]:
    with _splash_precision(query_BQND.dtype):
        return jax.vjp(partial(_attend, interpret=interpret), query_BQND, key_BKND, value_BKND)


def _flash_backward(
    interpret: bool, gradients_of: Callable[[jax.Array], Gradients], cotangent_BQND: jax.Array
) -> Gradients:
    # This is traced when the backward pass is, outside of what surrounded the forward pass.
    with _splash_precision(cotangent_BQND.dtype):
        return gradients_of(cotangent_BQND)


flash_attention_tpu.defvjp(_flash_forward, _flash_backward)


def _attend(query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, interpret: bool) -> jax.Array:
    queries, (_, keys, _, features) = query_BQND.shape[1], key_BKND.shape
    if not fits_flash_attention(queries, keys, features, key_BKND.dtype):
        return _splash(query_BQND, key_BKND, value_BKND, interpret)
    # XLA gives the products before and after it this order of axes: nothing is moved.
    positions_last = (x.transpose(0, 2, 3, 1) for x in (query_BQND, key_BKND, value_BKND))
    return flash_attention(*positions_last, interpret).transpose(0, 3, 1, 2)


def _splash(query_BQND: jax.Array, key_BKND: jax.Array, value_BKND: jax.Array, interpret: bool) -> jax.Array:
    (_, queries, heads, features), keys = query_BQND.shape, key_BKND.shape[1]
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((queries, keys))] * heads),
        block_sizes=_splash_blocks(queries, keys, features, query_BQND.dtype),
        interpret=interpret,
    )
    scaled_BQND = query_BQND * jnp.asarray(features**-0.5, query_BQND.dtype)
    query_BNQD, key_BNKD, value_BNKD = (array.swapaxes(1, 2) for array in (scaled_BQND, key_BKND, value_BKND))
    return jax.vmap(attend)(query_BNQD, key_BNKD, value_BNKD).swapaxes(1, 2)


def _splash_blocks(queries: int, keys: int, features: int, dtype: jnp.dtype) -> splash_attention.BlockSizes:
    gradient_blocks: Sequence[int]
    size = features * dtype.itemsize
    if keys % LARGEST_GRADIENT_BLOCK == 0 and size <= LARGEST_GRADIENT_BLOCK_MAX_BYTES:
        gradient_block, gradient_blocks = LARGEST_GRADIENT_BLOCK, LARGEST_GRADIENT_BLOCK_ROWS
    else:
        blocks = LARGE_GRADIENT_BLOCKS if size <= LARGE_GRADIENT_BLOCKS_MAX_BYTES else SPLASH_BLOCKS
        gradient_block, gradient_blocks = _largest_divisor(blocks, keys), SPLASH_BLOCKS
    # Features in the rows need none of the 128 lanes that they would not fill.
    features_first = splash_attention.QKVLayout.SEQ_MINOR
    return splash_attention.BlockSizes(
        block_q=_largest_divisor(SPLASH_BLOCKS, queries),
        block_kv=_largest_divisor(SPLASH_BLOCKS, keys),
        block_q_dkv=_largest_divisor(gradient_blocks, queries),
        block_kv_dkv=gradient_block,
        block_kv_dkv_compute=_largest_divisor(gradient_blocks, gradient_block),
        use_fused_bwd_kernel=True,
        q_layout=features_first,
        k_layout=features_first,
        v_layout=features_first,
    )


def _on_each_device(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A Pallas kernel on the rows of each device of the surrounding mesh: XLA cannot divide it by itself."""
    axes = jax.sharding.get_abstract_mesh().auto_axes
    if not axes:  # no mesh, or a function that is mapped over the devices already
        return kernel
    rows = jax.sharding.PartitionSpec(axes)
    return jax.shard_map(kernel, in_specs=rows, out_specs=rows, check_vma=False)


def _splash_precision(dtype: jnp.dtype) -> AbstractContextManager[Any]:
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _fits_splash(query_BQND: jax.Array, key_BKND: jax.Array) -> bool:
    if query_BQND.dtype == jnp.float16:  # which the kernel's compiler cannot load
        return False
    queries, (_, keys, _, features) = query_BQND.shape[1], key_BKND.shape
    if fits_flash_attention(queries, keys, features, key_BKND.dtype):
        return True
    return all(length >= SPLASH_MIN_LENGTH and length % SPLASH_LANES == 0 for length in (queries, keys))


def _largest_divisor(blocks: Sequence[int], length: int) -> int:
    return next(block for block in blocks if length % block == 0)


def _fits_cudnn(query_BQND: jax.Array, kernel: AttentionKernel) -> bool:
    features = query_BQND.shape[-1]
    is_half = query_BQND.dtype in (jnp.bfloat16, jnp.float16)
    _, most_features = CUDNN_KERNELS[kernel]
    return is_half and query_BQND.shape[1] % 2 == 0 and features % 8 == 0 and features <= most_features
