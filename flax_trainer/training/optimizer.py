"""AdamW on the trained parameters, as PyTorch takes its steps."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_trainer.models.params import Params
from flax_trainer.training.eight_bit_moments import dequantise, quantise
from flax_trainer.training.state import TrainState
from shared.config import TrainConfig

Scalar = jax.Array | np.generic


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW (Loshchilov & Hutter 2019) after clipping of the global gradient norm. Steps bring the learning rate."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float

    @classmethod
    def from_config(cls, config: TrainConfig) -> "AdamWSettings":
        """What the flags say."""
        return cls(
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            max_grad_norm=config.max_grad_norm,
        )


def adamw_update(
    state: TrainState, grads: Params, learning_rate: Scalar, settings: AdamWSettings, non_finite: jax.Array | np.ndarray
) -> TrainState:
    """One AdamW step on clipped gradients, as `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW` take it.

    The moving average, where the state has one, follows. Moments in eight bits are float32 for the step and rounded
    after it, as in bitsandbytes' `AdamW8bit`.

    Where `non_finite` (bool []), the state stays as it was and only its `non_finite` is set.
    """
    clipped, _ = optax.clip_by_global_norm(settings.max_grad_norm).update(grads, optax.EmptyState())
    step = where_tree(non_finite, state.step, optax.safe_increment(state.step))
    mu, nu = _in_float32(state.mu, state.mu_scales, signed=True), _in_float32(state.nu, state.nu_scales, signed=False)
    mu = where_tree(non_finite, mu, optax.tree.update_moment(clipped, mu, settings.beta1, 1))
    nu = where_tree(non_finite, nu, optax.tree.update_moment_per_elem_norm(clipped, nu, settings.beta2, 2))
    # The directions come from the moments that are kept, so that new ones may take the place of the old in memory.
    directions = jax.tree.map(
        lambda mean, square: mean / (jnp.sqrt(square) + settings.epsilon),
        optax.tree.bias_correction(mu, settings.beta1, step),
        optax.tree.bias_correction(nu, settings.beta2, step),
    )
    params = jax.tree.map(
        lambda param, direction: param - learning_rate * (direction + settings.weight_decay * param),
        state.params,
        directions,
    )
    params = where_tree(non_finite, state.params, params)
    ema = where_tree(non_finite, state.ema, average_update(state.ema, params, step))
    updated = state._replace(step=step, params=params, mu=mu, nu=nu, non_finite=non_finite, ema=ema)
    return _with_moments_in_eight_bits(updated, state, non_finite) if state.mu_scales else updated


def _in_float32(moments: Params, scales: Params, *, signed: bool) -> Params:
    return {
        name: dequantise(moment, scales[name], signed=signed) if name in scales else moment
        for name, moment in moments.items()
    }


def _with_moments_in_eight_bits(updated: TrainState, old: TrainState, non_finite: jax.Array | np.ndarray) -> TrainState:
    """`updated` with its large moments stored as those of `old`; rounding is no identity, so `old` may have to stay."""
    stored: dict[str, Params] = {"mu": {}, "nu": {}, "mu_scales": {}, "nu_scales": {}}
    for tree, signed in (("mu", True), ("nu", False)):
        moments = getattr(updated, tree)
        for name in old.mu_scales:
            stored[tree][name], stored[f"{tree}_scales"][name] = quantise(moments[name], signed=signed)
    kept = {
        tree: getattr(updated, tree) | where_tree(non_finite, {name: getattr(old, tree)[name] for name in new}, new)
        for tree, new in stored.items()
    }
    return updated._replace(**kept)


def average_update(ema: Params, params: Params, step: jax.Array) -> Params:
    """The moving average after `step` (counting from 1), as diffusers' `EMAModel` with its defaults takes it.

    The first step's parameters replace it, then it decays by min(0.9999, step / (step + 9)).
    """
    # 1 - decay, which float32 could not tell from 0 with much precision if it were computed like that.
    share_of_new = jnp.where(step == 1, 1.0, jnp.maximum(9 / (step + 9), 1e-4))
    return {name: mean - share_of_new * (mean - params[name]) for name, mean in ema.items()}


def where_tree(non_finite: jax.Array | np.ndarray, old: Any, new: Any) -> Any:
    """The old arrays where a run is non_finite, else the new ones."""
    return jax.tree.map(lambda old, new: jnp.where(non_finite, old, new), old, new)
