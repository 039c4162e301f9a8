"""What each backend does not do yet, and what it does in its own way. Implementing a flag deletes its row here."""

import dataclasses
from typing import Any

from shared.config.options import FLAGS, Backend, TrainConfig
from shared.user_errors import UserError

BACKEND_NAMES: dict[Backend, str] = {"flax": "Flax", "torch": "PyTorch"}


@dataclasses.dataclass(frozen=True)
class Missing:
    """A flag that a backend does not implement: with `value`, only that value; otherwise any but the default."""

    flag: str
    advice: str
    value: Any = None

    def is_asked_for_by(self, config: TrainConfig) -> bool:
        given = getattr(config, self.flag)
        return given == self.value if self.value is not None else given != FLAGS[self.flag].default


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A flag that a backend accepts although it does nothing literal about it; `notice` says what is true instead."""

    flag: str
    notice: str


_GPU_FEATURE = "Leave it out; it is a feature of PyTorch on GPUs."
_SEE_METRICS = "Leave it out; images_per_second and data_wait in metrics.jsonl tell where the time goes."

NOT_SUPPORTED: dict[Backend, tuple[Missing, ...]] = {
    "flax": (
        Missing("use_8bit_adam", _GPU_FEATURE),
        Missing("enable_npu_flash_attention", "Leave it out; XLA's attention is used."),
        Missing("crops_coords_top_left_h", "Leave it out; it concerns Stable Diffusion XL only."),
        Missing("crops_coords_top_left_w", "Leave it out; it concerns Stable Diffusion XL only."),
    ),
    "torch": (
        Missing(
            "gradient_checkpointing_policy",
            "Leave it out; diffusers' models recompute everything.",
            value="all_but_products",
        ),
        Missing(
            "parallelism",
            "Leave it out; start several processes with `accelerate launch`, and share a copy between them with "
            "torch_trainer/accelerate_configs/fsdp.yaml.",
            value="mesh",
        ),
        Missing("coordinator_address", "Leave it out; `accelerate launch` starts several processes."),
        Missing("ccache", "Leave it out; it is the folder of JAX's compilation cache."),
        Missing("profile_steps", _SEE_METRICS),
        Missing("profile_validation", _SEE_METRICS),
        Missing("profile_memory", "Leave it out; peak memory is in report.json."),
        Missing("crops_coords_top_left_h", "Leave it out; it concerns Stable Diffusion XL only."),
        Missing("crops_coords_top_left_w", "Leave it out; it concerns Stable Diffusion XL only."),
    ),
}

_EQUIVALENT: dict[Backend, tuple[Equivalent, ...]] = {
    "flax": (
        Equivalent("from_pt", "PyTorch safetensors are what is read with or without it"),
        Equivalent("controlnet_from_pt", "PyTorch safetensors are what is read with or without it"),
        Equivalent(
            "enable_xformers_memory_efficient_attention",
            "the device's memory-efficient attention is used: splash on TPUs, cuDNN's on NVIDIA GPUs, blocks elsewhere",
        ),
        Equivalent("set_grads_to_none", "JAX keeps no gradients from one step to the next"),
        Equivalent("local_rank", "JAX finds the processes itself and the value is ignored"),
        Equivalent("torch_compile", "JAX compiles every step as a whole anyway"),
    ),
    "torch": (Equivalent("local_rank", "accelerate finds the processes itself and the value is ignored"),),
}


def check_support(config: TrainConfig, backend: Backend) -> None:
    """Raise UserError for the first flag that `backend` does not implement yet, with what to do instead."""
    for missing in NOT_SUPPORTED[backend]:
        if missing.is_asked_for_by(config):
            value = f" {missing.value}" if missing.value is not None else ""
            name = BACKEND_NAMES[backend]
            raise UserError(f"--{missing.flag}{value} is not supported yet by the {name} backend: {missing.advice}")


def notices(config: TrainConfig, backend: Backend) -> list[str]:
    """One line for each flag given that `backend` honours in another way than literally."""
    return [
        f"--{row.flag}: {row.notice}."
        for row in _EQUIVALENT[backend]
        if getattr(config, row.flag) != FLAGS[row.flag].default
    ]
