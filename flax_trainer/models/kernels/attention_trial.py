"""Whether a GPU's fused attention runs where a training would use it, found out by running it once.

Axes as in `attention.py`.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.models.kernels.attention import (
    CUDNN_KERNELS,
    AttentionKernel,
    dot_product_attention,
    plain_attention,
)
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_QUERIES, _HEADS = 128, 2
_IMAGE, _CAPTION = 128, 77  # numbers of keys: a caption's is odd
_FEATURES = (40, 80, 160)  # of a head, in Stable Diffusion 1.x
_BOUND = 0.02  # of the largest number; bfloat16 rounds to 1/256


def kernel_that_runs(kernel: AttentionKernel, dtype: jax.typing.DTypeLike, *, asked_for: bool) -> AttentionKernel:
    """The kernel, or in place of one of cuDNN's that fails here, "blockwise" with a warning. Others are not tried.

    Versions of cuDNN, of its frontend in JAX and of drivers come in combinations that nobody has tried.

    Args:
        dtype: that attention is computed in; cuDNN's takes none of 32 bits, so there is nothing to try then.
        asked_for: whether the user insists on it.

    Raises:
        UserError: it fails, and the user insists on it.
    """
    if kernel not in CUDNN_KERNELS or jnp.dtype(dtype).itemsize != 2:
        return kernel
    problem = _problem(kernel, dtype)
    if problem is None:
        return kernel
    if asked_for:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: cuDNN's attention fails on this GPU ({problem}). Leave the "
            "flag out: attention is then computed in blocks. An update of jax[cuda13] or the driver may mend it."
        )
    logger.warning(
        "cuDNN's attention fails on this GPU (%s), so attention is computed in blocks, which takes longer. An update "
        "of jax[cuda13] or the driver may mend it",
        problem,
    )
    return "blockwise"


def _problem(kernel: AttentionKernel, dtype: jax.typing.DTypeLike) -> str | None:
    """What goes wrong, in a line."""
    try:
        fitting = [features for features in _FEATURES if features <= CUDNN_KERNELS[kernel][1]]
        shapes = [(_IMAGE, _FEATURES[0]), *((_CAPTION, features) for features in fitting)]
        differences = [_difference(kernel, dtype, keys, features) for keys, features in shapes]
    except (RuntimeError, ValueError, NotImplementedError) as error:  # of XLA, of JAX's checks
        return f"{type(error).__name__}: {error}".splitlines()[0][:200].strip()
    largest = float(np.max(differences))  # nan, if one of them is
    return None if largest <= _BOUND else f"its results differ by {largest:.2g} from those of plain attention"


def _difference(kernel: AttentionKernel, dtype: jax.typing.DTypeLike, keys: int, features: int) -> float:
    """Largest, relative to the largest number, of the result and its gradients; nan where they are not finite."""
    random = np.random.default_rng(0)
    shapes = [(1, length, _HEADS, features) for length in (_QUERIES, keys, keys)]
    arrays = [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]

    def results(attention: object) -> list[np.ndarray]:
        assert callable(attention)
        value, pullback = jax.vjp(attention, *arrays)
        return [np.asarray(array, np.float32) for array in (value, *pullback(value))]

    given = results(jax.jit(partial(dot_product_attention, kernel=kernel)))
    expected = results(jax.jit(plain_attention))
    pairs = zip(given, expected, strict=True)
    return float(np.max([np.abs(one - other).max() / np.abs(other).max() for one, other in pairs]))
