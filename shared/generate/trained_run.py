"""What the folder of a training run says about the ControlNet in it."""

import logging
import os
from pathlib import Path

from shared.config import TrainConfig
from shared.config.command_line import read_configuration
from shared.models.source import CONFIG_FILE, shown_name
from shared.models.trained_parts import UNET_FOLDER
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

RUN_CONFIG = "config.yaml"
# What belongs to a base model, and is told together with it.
OF_BASE_MODEL = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pretrained_vae_model_name_or_path",
    "tokenizer_name",
)


def run_of(controlnet: str) -> TrainConfig | None:
    """The configuration of the run whose folder this is; None for any other folder, and for a name on the Hub.

    Raises:
        UserError: its configuration cannot be read, or the run has not left its ControlNet yet.
    """
    folder = Path(controlnet)
    if not os.path.isfile(folder / RUN_CONFIG):
        return None
    config = read_configuration(["--config", str(folder / RUN_CONFIG)])
    if not os.path.isfile(folder / CONFIG_FILE):
        raise UserError(
            f"--controlnet_model_name_or_path {shown(folder)} is the folder of a run that has not left its ControlNet "
            "yet: it does so at its end. Let it end (it continues with --resume_from_checkpoint latest), or give "
            "another."
        )
    return config


def base_model_of(run: TrainConfig) -> dict[str, str | None]:
    """Flags that name the run's base model; said in the log."""
    logger.info("Base model, from the run's config.yaml: %s", shown_name(str(run.pretrained_model_name_or_path)))
    return {name: getattr(run, name) for name in OF_BASE_MODEL}


def trained_unet(controlnet: str) -> Path | None:
    """The folder with a UNet beside the ControlNet, whose decoder a run with `--sd_unlocked` trained; None without."""
    folder = Path(controlnet)
    return folder if os.path.isfile(folder / UNET_FOLDER / CONFIG_FILE) else None
