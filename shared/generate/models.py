"""Which models draw: what flags and a run's folder name, told from small files before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.config import TrainConfig
from shared.data.preprocessing import MODES
from shared.data.tokenization import PromptInputs
from shared.diffusion.schedule import NoiseSchedule
from shared.generate.options import GenerateConfig
from shared.generate.trained_run import OF_BASE_MODEL, TrainedRun, run_of, trained_unet
from shared.models.base_model import check_base_model
from shared.models.configs import (
    AutoencoderKLConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    read_config,
)
from shared.models.source import ModelSource, base_source, controlnet_source, vae_source
from shared.models.xl import is_xl
from shared.run.setup import prompt_inputs_of
from shared.untrusted import shown
from shared.user_errors import UserError

_USUAL_SIDE = 512  # of models whose configuration does not say


@dataclass(frozen=True, eq=False)
class NamedModels:
    """Models that belong together.

    Attributes:
        config: names them, as a training's configuration does.
        run: whose ControlNet it is, where it is the folder of one, or a checkpoint in it.
        unet: in place of the base model's, where a run trained its decoder; None otherwise.
    """

    config: TrainConfig
    run: TrainedRun | None
    unet: ModelSource | None
    schedule: NoiseSchedule
    prompt_inputs: PromptInputs
    unet_config: UNet2DConditionConfig
    vae_config: AutoencoderKLConfig
    controlnet_config: ControlNetConfig

    @property
    def checkpoint(self) -> Path | None:
        """Of a run, whose parameters take the place of those that `config` names."""
        return None if self.run is None else self.run.checkpoint

    @property
    def usual_size(self) -> tuple[int, int]:
        """(height, width) that the run, or else the base model, was trained on; as diffusers' pipelines take it."""
        if self.run is not None:
            return self.run.config.resolution, self.run.config.resolution
        latents, factor = self.unet_config.sample_size, self.vae_config.scale_factor
        if latents is None:
            return _USUAL_SIDE, _USUAL_SIDE
        sides = latents if isinstance(latents, tuple) else (latents,)
        return sides[0] * factor, sides[-1] * factor


def find_models(config: GenerateConfig) -> NamedModels:
    """Read the models' small files.

    Raises:
        UserError: one is missing or damaged, or they do not belong together.
    """
    name = str(config.controlnet_model_name_or_path)
    run = run_of(name)
    models = _with_channels(_named(config, run), config.conditioning_channels, run)
    schedule = NoiseSchedule.from_source(base_source(models, "scheduler"))
    unet = check_base_model(models, schedule.config)
    source = controlnet_source(models)
    controlnet = (
        ControlNetConfig.from_unet_config(unet, conditioning_channels=models.control_channels)
        if source is None
        else read_config(source.file(), ControlNetConfig)
    )
    vae = read_config(vae_source(models).file(), AutoencoderKLConfig)
    return NamedModels(
        config=models,
        run=run,
        unet=_trained_unet(config, unet),
        schedule=schedule,
        prompt_inputs=prompt_inputs_of(models, is_xl=is_xl(unet)),
        unet_config=unet,
        vae_config=vae,
        controlnet_config=controlnet,
    )


def _with_channels(models: TrainConfig, asked: tuple[int, ...] | None, run: TrainedRun | None) -> TrainConfig:
    """With the channels of each condition: those asked for, or the run's several, or the ControlNet's own where it has
    one.

    Raises:
        UserError: nothing says which conditions make up the ControlNet's channels, or they do not.
    """
    of_run = () if run is None else run.config.channels_of_conditions
    told = asked or (of_run if len(of_run) > 1 else None)
    source = controlnet_source(models)
    if source is None:  # it is new at the beginning of the run whose checkpoint is meant
        assert run is not None
        name, taken = shown(run.checkpoint), run.config.control_channels
    else:
        name, taken = source.name, read_config(source.file(), ControlNetConfig).conditioning_channels
    if told is None and taken not in MODES:
        raise UserError(
            f"The ControlNet in {name} takes conditions of {taken} channels (conditioning_channels in its "
            "config.json): say with --conditioning_channels of which images, 3 for each in colours and 1 for each grey "
            "one, in the order of its training."
        )
    channels = told or (taken,)
    if sum(channels) != taken:
        raise UserError(
            f"--conditioning_channels {' '.join(map(str, channels))} come to {sum(channels)} channels, and the "
            f"ControlNet in {name} takes {taken} (conditioning_channels in its config.json): give images of so many."
        )
    return replace(models, conditioning_channels=channels)


def _trained_unet(config: GenerateConfig, base: UNet2DConditionConfig) -> ModelSource | None:
    """That beside the ControlNet, if there is one."""
    source = trained_unet(str(config.controlnet_model_name_or_path), config.controlnet_revision, config.cache_dir)
    if source is not None and read_config(source.file(), UNet2DConditionConfig) != base:
        raise UserError(
            f"The UNet in {source.name}, trained with the ControlNet, is of another architecture than the base "
            "model's: give the base model that the ControlNet was trained on."
        )
    return source


def _named(config: GenerateConfig, run: TrainedRun | None) -> TrainConfig:
    """The models by the names that a training's configuration has for them."""
    named = {name: getattr(config, name) for name in OF_BASE_MODEL}
    if named["pretrained_model_name_or_path"] is None:
        if run is None or run.config.pretrained_model_name_or_path is None:
            raise UserError(
                "--pretrained_model_name_or_path is missing, and --controlnet_model_name_or_path "
                f"{shown(config.controlnet_model_name_or_path)} is not the folder of a run whose config.yaml "
                "names it: give the base model that the ControlNet was made for."
            )
        named = run.base_model() | {name: value for name, value in named.items() if value is not None}
    names = ("controlnet_model_name_or_path", "controlnet_revision")
    controlnet: dict[str, Any] = {name: getattr(config, name) for name in names}
    if run is not None and run.checkpoint is not None:
        controlnet = run.beginning()
    return TrainConfig(
        **named,
        **controlnet,
        cache_dir=config.cache_dir,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
        enable_xformers_memory_efficient_attention=config.enable_xformers_memory_efficient_attention,
        allow_tf32=config.allow_tf32,
        ccache=config.ccache,
    )
