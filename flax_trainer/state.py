"""What a training step changes: arrays on the devices during a run, numpy before and after it."""

from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Arrays = dict[str, Any]  # jax.Array or numpy.ndarray


class TrainState(NamedTuple):
    """The trainable half of a run. `mu` and `nu` are Adam's moments, under the same names as `params`.

    `step` counts optimizer steps taken. `halted` is set by the first non-finite loss or gradient and freezes everything
    else, so that what is saved afterwards is what was last good, however many steps were already on their way.
    """

    step: Array  # int32 []
    params: Arrays  # float32
    mu: Arrays  # float32
    nu: Arrays  # float32
    halted: Array  # bool []

    @classmethod
    def create(cls, params: Arrays) -> "TrainState":
        """Step 0: these parameters, zero moments."""
        mu, nu = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
        return cls(np.array(0, np.int32), params, mu, nu, np.array(False))

    def to_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of the state."""
        return {"step": self.step, "params": self.params, "mu": self.mu, "nu": self.nu}

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> "TrainState":
        """The inverse of `to_checkpoint`; a saved state is never halted."""
        return cls(**saved, halted=np.array(False))
