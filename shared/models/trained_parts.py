"""What training moves: usually the whole ControlNet; less with `--only_mid_control`, more with `--sd_unlocked`.

Both are options of ControlNet's own trainer (https://github.com/lllyasviel/ControlNet, cldm/cldm.py and docs/train.md),
where the second is `sd_locked = False` and the decoder is called `output_blocks` and `out`.
"""

from collections.abc import Mapping
from typing import TypeVar

UNET_FOLDER = "unet"
UNET_PREFIX = "unet."  # sets the UNet's names apart from the ControlNet's among the trained parameters
LARGEST_ADVISED_LEARNING_RATE = 2e-6  # docs/train.md there
DOWN_RESIDUALS = "controlnet_down_blocks."  # what the residuals of the down blocks pass through
_DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")

Value = TypeVar("Value")


def is_decoder(name: str) -> bool:
    """Whether a UNet's parameter, by its name there, belongs to the decoder."""
    return name.startswith(_DECODER)


def with_unet_prefix(decoder: Mapping[str, Value]) -> dict[str, Value]:
    """The decoder's parameters, under their names among all trained ones."""
    return {f"{UNET_PREFIX}{name}": value for name, value in decoder.items()}


def split_trained(trained: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """(the ControlNet's parameters, the decoder's), each under its name in its own model."""
    controlnet = {name: value for name, value in trained.items() if not name.startswith(UNET_PREFIX)}
    decoder = {name.removeprefix(UNET_PREFIX): value for name, value in trained.items() if name not in controlnet}
    return controlnet, decoder


def only_mid_control_notice(controlnet: str) -> str:
    """One line for a run that starts from a ControlNet with other residuals."""
    return f"--only_mid_control: the residuals of the down blocks of {controlnet} are set to zero and stay so."


def sd_unlocked_warning(learning_rate: float) -> str:
    """One line for the start of a run."""
    return (
        "--sd_unlocked trains the base model's decoder too, which may harm what the model can do. ControlNet's authors "
        f"advise a learning rate of {LARGEST_ADVISED_LEARNING_RATE:g} or lower; it is {learning_rate:g}."
    )
