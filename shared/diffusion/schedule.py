"""The noise schedule of a base model, and what a network trained on it predicts.

T training timesteps; B batch. Images are in any layout of rank 4 whose first axis is B (BHWC in JAX, BCHW in PyTorch).

The tables are numpy and computed once; both backends gather from them and apply the same formulas, which use only
arithmetic and so take numpy, JAX and PyTorch arrays alike.
x_t = a·x_0 + s·noise, where a² = alphas_cumprod and s² = 1 - a².
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
import numpy as np

from shared.models.source import ModelSource
from shared.untrusted import MIB, read_json, shown
from shared.untrusted.documents import convert
from shared.user_errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SCHEDULER_FILE = "scheduler_config.json"

_LARGEST_FILE = 16 * MIB  # a hundred thousand trained betas have some two
_MOST_TIMESTEPS = 100_000  # a hundred times as many as any published model was trained with

_Timesteps = Annotated[int, msgspec.Meta(le=_MOST_TIMESTEPS)]
_Beta = Annotated[float, msgspec.Meta(ge=0, le=1e6)]  # from 1 on it is refused in words of its own
_FIELDS: dict[str, Any] = {
    "num_train_timesteps": _Timesteps,
    "beta_start": _Beta,
    "beta_end": _Beta,
    "trained_betas": Annotated[list[float], msgspec.Meta(max_length=_MOST_TIMESTEPS)] | None,
    "rescale_betas_zero_snr": bool | None,
    "set_alpha_to_one": bool | None,
    "clip_sample": bool | None,
    "clip_sample_range": Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None,
    "steps_offset": Annotated[int, msgspec.Meta(ge=0, le=_MOST_TIMESTEPS)],
}

Array = Any  # numpy.ndarray, jax.Array or torch.Tensor: the formulas use nothing but arithmetic
Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables of a variance-preserving diffusion (Ho et al. 2020, "Denoising Diffusion Probabilistic Models").

    `alphas_cumprod`, `sqrt_alphas_cumprod` (a) and `sqrt_one_minus_alphas_cumprod` (s) are float32 [T], equal to those
    that diffusers' schedulers compute from the same configuration. `config` is the scheduler's configuration as given:
    `samplers.py` reads its sampling options.
    """

    alphas_cumprod: np.ndarray
    prediction_type: PredictionType
    config: Config
    sqrt_alphas_cumprod: np.ndarray = field(init=False)
    sqrt_one_minus_alphas_cumprod: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sqrt_alphas_cumprod", np.sqrt(self.alphas_cumprod))
        object.__setattr__(self, "sqrt_one_minus_alphas_cumprod", np.sqrt(np.float32(1) - self.alphas_cumprod))

    @property
    def num_train_timesteps(self) -> int:
        """T: training timesteps are 0 … T-1."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Config) -> "NoiseSchedule":
        """The schedule that a diffusers `scheduler_config.json` describes.

        Absent keys take the defaults of diffusers' DDPMScheduler.

        Raises:
            UserError: unknown beta schedule or prediction type, or values that make no schedule.
        """
        _check_types(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"The scheduler's prediction_type is {shown(repr(prediction_type))}; expected one of "
                f"{', '.join(PREDICTION_TYPES)}. Choose a base model trained on one of these, or correct "
                f"its {SCHEDULER_FILE}."
            )
        betas = _betas(config)
        if not ((betas >= 0) & (betas < 1)).all():
            raise UserError(
                f"The scheduler's betas lie between {betas.min()} and {betas.max()}; expected values in [0, 1). "
                f"Correct beta_start, beta_end or trained_betas in its {SCHEDULER_FILE}."
            )
        if config.get("rescale_betas_zero_snr", False):
            betas = rescale_betas_to_zero_terminal_snr(betas)
        alphas_cumprod = _cumulative_alphas(betas)
        if not np.isfinite(alphas_cumprod).all():
            raise UserError(
                "The scheduler's rescale_betas_zero_snr cannot be applied: its betas add no noise at all; expected "
                f"betas above 0. Correct beta_start, beta_end or trained_betas in its {SCHEDULER_FILE}."
            )
        return cls(alphas_cumprod, cast(PredictionType, prediction_type), dict(config))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str = "scheduler",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> "NoiseSchedule":
        """The schedule of a base model: a local folder in diffusers' layout, or a Hub repository's id.

        Raises:
            UserError: as `from_source`.
        """
        return cls.from_source(ModelSource(path_or_repo, subfolder, revision, cache_dir=cache_dir))

    @classmethod
    def from_source(cls, scheduler: ModelSource) -> "NoiseSchedule":
        """The schedule of a base model's scheduler.

        Raises:
            UserError: there is no such folder, repository or file, or it cannot be reached or read.
        """
        path = scheduler.file(SCHEDULER_FILE)
        fix = f"Expected diffusers' {SCHEDULER_FILE}; download or copy it again."
        # diffusers writes an infinity into the files of DPMSolverMultistepScheduler.
        config: dict[str, Any] = read_json(path, fix=fix, limit=_LARGEST_FILE, infinities=True)
        return cls.from_config(config)


def rescale_betas_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last timestep is pure noise: Lin et al. 2023, "Common Diffusion Noise Schedules…", Algorithm 1.

    float32 [T] in, float32 [T] out; float32 throughout, as diffusers' `rescale_zero_terminal_snr`. PyTorch's
    square root may be off by a rounding and the subtraction cancels near the end, so there the two agree to about 1e-5
    relative.
    """
    sqrt_alphas_bar = np.sqrt(_cumulative_alphas(betas))
    first, last = sqrt_alphas_bar[0], sqrt_alphas_bar[-1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # from_config looks at what comes out
        alphas_bar = np.square((sqrt_alphas_bar - last) * (first / (first - last)))
        alphas = np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return np.float32(1) - alphas


def gather(table_T: Array, timesteps_B: Array) -> Array:
    """Each sample's entry of a table, as [B, 1, 1, 1] to broadcast over images. Both are of the caller's array kind."""
    return table_T[timesteps_B][:, None, None, None]


def add_noise(x0: Array, noise: Array, a: Array, s: Array) -> Array:
    """x_t = a·x_0 + s·noise (Ho et al. 2020, eq. 4)."""
    return a * x0 + s * noise


def velocity(x0: Array, noise: Array, a: Array, s: Array) -> Array:
    """v = a·noise - s·x_0 (Salimans & Ho 2022, "Progressive Distillation…", section 4)."""
    return a * noise - s * x0


def training_target(prediction_type: PredictionType, x0: Array, noise: Array, a: Array, s: Array) -> Array:
    """What the network should output at x_t."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x0, noise, a, s)
    assert prediction_type == "sample", prediction_type
    return x0


def predicted_x0(prediction_type: PredictionType, output: Array, x_t: Array, a: Array, s: Array) -> Array:
    """The clean sample that a network's output at x_t implies. Infinite for epsilon where a = 0."""
    if prediction_type == "epsilon":
        return (x_t - s * output) / a
    if prediction_type == "v_prediction":
        return a * x_t - s * output
    assert prediction_type == "sample", prediction_type
    return output


def predicted_noise(prediction_type: PredictionType, output: Array, x_t: Array, a: Array, s: Array) -> Array:
    """The noise that a network's output at x_t implies. Infinite for sample where s = 0."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return a * output + s * x_t
    assert prediction_type == "sample", prediction_type
    return (x_t - a * output) / s


def _check_types(config: Config) -> None:
    for name in _FIELDS.keys() & config.keys():
        where = f"The scheduler's {name}, {shown(repr(config[name]))},"
        convert(config[name], _FIELDS[name], where=where, fix=f"Correct its {SCHEDULER_FILE}.")


def _betas(config: Config) -> np.ndarray:
    """float32 [T], before any rescaling."""
    count = config.get("num_train_timesteps", 1000)
    if count < 1:
        raise UserError(f"The scheduler's num_train_timesteps is {count!r}; expected a positive whole number.")
    trained = config.get("trained_betas")
    if trained is not None:
        if len(trained) != count:
            raise UserError(
                f"The scheduler has {len(trained)} trained_betas and num_train_timesteps {count}; expected as many of "
                f"one as of the other. Correct its {SCHEDULER_FILE}."
            )
        return np.asarray(trained, np.float32)

    name = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if name == "linear":
        return _linspace(start, end, count)
    if name == "scaled_linear":
        return np.square(_linspace(start**0.5, end**0.5, count))
    if name == "squaredcos_cap_v2":
        return _cosine_betas(count)
    raise UserError(
        f"The scheduler's beta_schedule is {shown(repr(name))}; expected one of {', '.join(BETA_SCHEDULES)}, or "
        "trained_betas. Choose a base model that uses one of these."
    )


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """`torch.linspace` in float32: from both ends towards the middle, each value rounded once (fused multiply-add)."""
    index = np.arange(count)
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    values = np.where(index < max(count // 2, 1), first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)


def _cosine_betas(count: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 17, capped at 0.999."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return np.asarray(betas, np.float32)


def _cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    """float32 [T]; the running product is kept in float64, as `torch.cumprod` keeps it."""
    alphas = np.float32(1) - betas
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)
