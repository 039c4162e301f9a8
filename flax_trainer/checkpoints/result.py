"""The weights that a finished run leaves, in diffusers' layout."""

from collections.abc import Mapping
from pathlib import Path

from flax_trainer.base_models import BaseModels, load_unet
from flax_trainer.models import FlaxControlNetModel, FlaxUNet2DConditionModel
from flax_trainer.models.params import HostParams, split
from shared.config import TrainConfig
from shared.models.trained_parts import UNET_FOLDER, split_trained
from shared.run.result import SaveWeights


def result_to_save(config: TrainConfig, models: BaseModels, result: HostParams) -> Mapping[str, SaveWeights]:
    """How to write the ControlNet and, where its decoder was trained, the UNet into a folder.

    Writing the UNet raises UserError where the base model cannot be read any more.
    """
    controlnet, decoder = split_trained(result)

    def save_controlnet(folder: Path) -> None:
        FlaxControlNetModel.save_params(folder, models.configs.controlnet, controlnet, models.defs.controlnet.layouts)

    def save_unet(folder: Path) -> None:
        unet_config, unet = load_unet(config)  # again: in memory the rest of it may be rounded
        layouts = split(FlaxUNet2DConditionModel.abstract(unet_config))[0].layouts
        FlaxUNet2DConditionModel.save_params(folder / UNET_FOLDER, unet_config, unet | decoder, layouts)

    decoders: dict[str, SaveWeights] = {"the UNet": save_unet} if decoder else {}
    return {"the ControlNet": save_controlnet, **decoders}
