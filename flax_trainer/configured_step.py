"""The training step that a configuration asks for: what `train_flax.py` runs and `compile_report` compiles."""

import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels
from flax_trainer.distributed.engine import CompiledStep, Engine
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.step import Objective, make_train_step
from shared.config import TrainConfig
from shared.diffusion.loss_weighting import min_snr_weights


def configured_train_step(config: TrainConfig, models: BaseModels, engine: Engine) -> CompiledStep:
    """It compiles when it is first called or lowered."""
    step = make_train_step(
        engine.adapt(models.defs), objective_of(config, models), _adamw_settings(config), axis_name=engine.axis_name
    )
    return engine.compile_train_step(step)


def objective_of(config: TrainConfig, models: BaseModels) -> Objective:
    timesteps = models.schedule.num_train_timesteps
    return Objective(
        schedule=models.schedule,
        loss_weights=np.ones(timesteps, np.float32)
        if config.snr_gamma is None
        else min_snr_weights(models.schedule, config.snr_gamma),
        scaling_factor=models.configs.vae.scaling_factor,
        compute_dtype=jnp.dtype(COMPUTE_DTYPES[config.mixed_precision or "no"]),
    )


def matmul_precision(config: TrainConfig) -> str:
    """What `jax_default_matmul_precision` has to be."""
    if config.mixed_precision == "bf16":
        # Nothing else is multiplied, and these products are exact in float32. Asked for more, XLA takes the trained
        # weights before they are rounded to bfloat16, which a TPU then multiplies in three passes.
        return "default"
    return "tensorfloat32" if config.allow_tf32 else "highest"


def _adamw_settings(config: TrainConfig) -> AdamWSettings:
    return AdamWSettings(
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
