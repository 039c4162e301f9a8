"""What an optimizer step takes on a TPU v4, with moments in float32 and in eight bits, by the TPU's compiler.

    python3 -m benchmarks.tpu_optimizer

The parameters are 40 M in the shapes that most of SDXL's ControlNet has. No TPU is needed; `pip install 'jax[tpu]'`
brings the compiler.
"""

import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from flax_trainer.compile_report.costs import costs_of
from flax_trainer.compile_report.hlo import parse_program
from flax_trainer.compile_report.report import moments_in_eight_bits
from flax_trainer.compile_report.targets import parse_target
from flax_trainer.training.optimizer import AdamWSettings, adamw_update
from flax_trainer.training.state import TrainState

TARGET = parse_target("v4-8")
ON_ONE_CHIP = SingleDeviceSharding(TARGET.devices()[0])
SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=1.0)
SHAPES = (
    *((1280, 1280), (1280, 10240), (5120, 1280), (2048, 640), (640, 2560), (320, 320), (1280,)),
    *((3, 3, 1280, 1280), (3, 3, 320, 320)),
)


def main() -> None:
    print(f"{'moments':<10}{'M cycles':>10}{'GB':>8}{'GB temporary':>14}   (compiler estimate)")
    params = {str(number): _array(shape, jnp.float32) for number, shape in enumerate(SHAPES)}
    step: Any = _array((), jnp.int32)
    non_finite: Any = _array((), jnp.bool_)
    in_float32 = TrainState(step, params, params, params, non_finite)
    in_eight_bits = jax.tree.map(lambda leaf: _array(leaf.shape, leaf.dtype), moments_in_eight_bits(in_float32))
    for label, state in (("float32", in_float32), ("8 bits", in_eight_bits)):
        compiled = jax.jit(_update, donate_argnums=0).lower(state, params).compile()
        analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        assert memory is not None, "the TPU compiler analyses memory"
        cycles = costs_of(parse_program(compiled.as_text() or ""), {}, TARGET).cycles / 1e6
        temporary = memory.temp_size_in_bytes / 1e9
        print(f"{label:<10}{cycles:>10.2f}{analysis['bytes accessed'] / 1e9:>8.2f}{temporary:>14.2f}", flush=True)


def _update(state: TrainState, grads: Any) -> TrainState:
    return adamw_update(state, grads, np.float32(1e-4), SETTINGS, state.non_finite)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=ON_ONE_CHIP)


if __name__ == "__main__":
    main()
