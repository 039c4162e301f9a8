"""Dynamic loss scaling for float16, by the rules of `torch.amp.GradScaler` with its default settings.

Gradients of float16 activations vanish below 6e-8, so the loss is multiplied before the backward pass and the gradients
are divided after it (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps with finite gradients, in a row, after which the scale is doubled

Tree = Any
LossScaler = dict[str, Any]  # `scale` float32 [], `growth_tracker` int32 []: finite steps since the scale changed


def initial_loss_scaler() -> LossScaler:
    """What a run begins with."""
    return {"scale": np.array(INITIAL_SCALE, np.float32), "growth_tracker": np.array(0, np.int32)}


def unscaled_gradients(
    loss_and_grads: Callable[[jax.Array], tuple[jax.Array, Tree]],
    scaler: LossScaler,
    non_finite: jax.Array | np.ndarray,
) -> tuple[jax.Array, Tree, LossScaler]:
    """Take gradients, with half the scale again and again as long as they overflow: a batch is never given up.

    Args:
        loss_and_grads: scale → (the loss, not scaled; the gradients, divided by the scale again). On several devices
            both are the same on all of them, which therefore try equally often.
        non_finite: bool []; where it is set, nothing is tried again.
    Returns:
        loss, gradients, the scaler after this step. The gradients are not finite where the loss is not, or where they
        overflow even at scale 1.
    """

    def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = carry[0]
        loss, grads = loss_and_grads(scale)
        too_high = jnp.isfinite(loss) & ~jnp.isfinite(optax.tree.norm(grads)) & (scale > 1) & ~non_finite
        return jnp.where(too_high, scale / 2, scale), too_high, loss, grads

    before = jnp.asarray(scaler["scale"])
    shapes = jax.eval_shape(loss_and_grads, before)
    nothing_yet = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    scale, _, loss, grads = jax.lax.while_loop(lambda carry: carry[1], attempt, (before, jnp.array(True), *nothing_yet))
    finite_steps = jnp.where(scale < before, 0, scaler["growth_tracker"]) + 1
    grows = finite_steps == GROWTH_INTERVAL
    after = {
        "scale": jnp.where(grows & jnp.isfinite(scale * 2), scale * 2, scale),
        "growth_tracker": jnp.where(grows, 0, finite_steps).astype(jnp.int32),
    }
    return loss, grads, after
