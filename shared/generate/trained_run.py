"""What the folder of a training run says about the ControlNet in it, or in one of its checkpoints."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoints.policy import checkpoints_in, is_checkpoint
from shared.config import TrainConfig
from shared.config.command_line import read_configuration
from shared.config.options import FLAGS
from shared.config.validation import check_values
from shared.models.source import CONFIG_FILE, ModelSource, shown_name
from shared.models.trained_parts import UNET_FOLDER
from shared.run.folder import RUN_CONFIG
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

# What belongs to a base model, and is told together with it.
OF_BASE_MODEL = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pretrained_vae_model_name_or_path",
    "tokenizer_name",
)
# What a checkpoint's parameters are of: it holds no configuration of the ControlNet.
_OF_CHECKPOINT = (
    "controlnet_model_name_or_path",
    "controlnet_revision",
    "only_mid_control",
    "sd_unlocked",
)


@dataclass(frozen=True)
class TrainedRun:
    """A run's configuration, and which of its checkpoints is meant; None for what the run left at its end."""

    config: TrainConfig
    checkpoint: Path | None

    def base_model(self) -> dict[str, str | None]:
        """Flags that name the run's base model; said in the log."""
        name = shown_name(str(self.config.pretrained_model_name_or_path))
        logger.info("Base model, from the run's %s: %s", RUN_CONFIG, name)
        return {name: getattr(self.config, name) for name in OF_BASE_MODEL}

    def beginning(self) -> dict[str, Any]:
        """Flags that name the models as they were when the run began, which a checkpoint's parameters replace."""
        return {name: getattr(self.config, name) for name in _OF_CHECKPOINT}


def run_of(controlnet: str) -> TrainedRun | None:
    """The run whose folder, or checkpoint in its folder, this is; None for any other folder, and a name on the Hub.

    Raises:
        UserError: its configuration cannot be read or is not there, or the run has not left its ControlNet yet.
    """
    folder = Path(controlnet)
    if is_checkpoint(folder):
        if not os.path.isfile(folder.parent / RUN_CONFIG):
            raise UserError(
                f"--controlnet_model_name_or_path {shown(folder)} is a checkpoint without its run's {RUN_CONFIG} in "
                "the folder around it, which says what it is of. Copy that there, or give the run's own folder."
            )
        return TrainedRun(_configuration(folder.parent), folder)
    if not os.path.isfile(folder / RUN_CONFIG):
        return None
    config = _configuration(folder)
    if not os.path.isfile(folder / CONFIG_FILE):
        checkpoints = checkpoints_in(folder)
        advice = f"give its newest checkpoint, {checkpoints[-1]}," if checkpoints else "let it end,"
        raise UserError(
            f"--controlnet_model_name_or_path {shown(folder)} is the folder of a run that has not left its ControlNet "
            f"yet, which it does at its end: {shown(advice)} or give another."
        )
    return TrainedRun(config, None)


def trained_unet(controlnet: str, revision: str | None, cache_dir: str | None) -> ModelSource | None:
    """The UNet beside the ControlNet, whose decoder a run with `--sd_unlocked` trained; None where there is none."""
    source = ModelSource(controlnet, UNET_FOLDER, revision, cache_dir=cache_dir)
    if source.optional_file(CONFIG_FILE) is None:
        return None
    logger.info(
        "The UNet in %s, whose decoder was trained with the ControlNet, takes the base model's place", source.name
    )
    return source


def _configuration(folder: Path) -> TrainConfig:
    path = folder / RUN_CONFIG
    config = read_configuration(["--config", str(path)])
    try:
        check_values(config, FLAGS)
    except UserError as error:
        raise UserError(f"{shown(path)}: {error} It says what the run's ControlNet is of: correct it.") from error
    return config
