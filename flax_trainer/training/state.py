"""What a training step changes: arrays on the devices during a run, numpy before and after it."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flax_trainer.training.loss_scaling import initial_loss_scaler
from shared.eight_bit_moments import blocks_of, quantised, zero_moment

Array = jax.Array | np.ndarray
Arrays = dict[str, Any]  # jax.Array or numpy.ndarray


class TrainState(NamedTuple):
    """The trainable half of a run. `mu` and `nu` are Adam's moments, under the same names as `params`.

    `step` counts optimizer steps taken. `non_finite` is set by the first loss or gradient that is not finite, and
    freezes everything else, so that what is saved afterwards is what was last good, however many steps were already on
    their way. `loss_scaler` is that of `loss_scaling.py`; it is empty in runs that scale no loss. `ema` is the moving
    average of `params`, under the same names; it is empty in runs that keep none. With `--use_8bit_adam`, the moments
    of large parameters are codes, and `mu_scales` and `nu_scales` hold the scales of their blocks
    (`shared.eight_bit_moments`), under the same names; without it they are empty.
    """

    step: Array  # int32 []
    params: Arrays  # float32
    mu: Arrays  # float32, or uint8
    nu: Arrays  # float32, or uint8
    non_finite: Array  # bool []
    loss_scaler: Arrays = {}  # noqa: RUF012 (nothing writes to it)
    ema: Arrays = {}  # noqa: RUF012 (nothing writes to it); float32
    mu_scales: Arrays = {}  # noqa: RUF012 (nothing writes to it); float32
    nu_scales: Arrays = {}  # noqa: RUF012 (nothing writes to it); float32

    @classmethod
    def create(
        cls, params: Arrays, *, scales_loss: bool = False, averages: bool = False, eight_bits: bool = False
    ) -> "TrainState":
        """Step 0: these parameters, zero moments."""
        (mu, mu_scales), (nu, nu_scales) = (
            _no_moments(params, signed=signed, eight_bits=eight_bits) for signed in (True, False)
        )
        loss_scaler = initial_loss_scaler() if scales_loss else {}
        ema = {name: np.array(value) for name, value in params.items()} if averages else {}
        return cls(np.array(0, np.int32), params, mu, nu, np.array(False), loss_scaler, ema, mu_scales, nu_scales)

    def with_moments_in_eight_bits(self) -> "TrainState":
        """The same on the host with float32 moments stored as `--use_8bit_adam` stores them."""
        (mu, mu_scales), (nu, nu_scales) = (
            _in_eight_bits(moments, signed=signed) for moments, signed in ((self.mu, True), (self.nu, False))
        )
        return self._replace(mu=mu, nu=nu, mu_scales=mu_scales, nu_scales=nu_scales)

    @property
    def result(self) -> Arrays:
        """The parameters that are validated and published: the averaged ones where there are any."""
        return self.ema or self.params

    def to_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of the state: what a run has no use for is not in it."""
        saved = self._asdict()
        del saved["non_finite"]
        return {name: value for name, value in saved.items() if not isinstance(value, dict) or value}

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> "TrainState":
        """The inverse of `to_checkpoint`; a saved state is always finite."""
        return cls(**saved, non_finite=np.array(False))

    def with_loss_scaler_of(self, fresh: "TrainState") -> "TrainState":
        """As the run that `fresh` begins can use it: without a loss scaler, or with one, new where this has none.

        The precision may change from one part of a run to the next.
        """
        return self if self.loss_scaler and fresh.loss_scaler else self._replace(loss_scaler=fresh.loss_scaler)


def _no_moments(params: Arrays, *, signed: bool, eight_bits: bool) -> tuple[Arrays, Arrays]:
    """Zeros, and the scales of those that are stored as codes."""
    moments: Arrays = {}
    scales: Arrays = {}
    for name, value in params.items():
        if eight_bits and blocks_of(value.shape) is not None:
            moments[name], scales[name] = zero_moment(value.shape, signed=signed)
        else:
            moments[name] = np.zeros_like(value)
    return moments, scales


def _in_eight_bits(moments: Arrays, *, signed: bool) -> tuple[Arrays, Arrays]:
    """Codes, or what stays in float32, and scales."""
    stored = {
        name: quantised(moment, signed=signed)
        for name, moment in moments.items()
        if blocks_of(moment.shape) is not None
    }
    codes = {name: array for name, (array, _) in stored.items()}
    return moments | codes, {name: scales for name, (_, scales) in stored.items()}
