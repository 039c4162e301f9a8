"""Which models draw: what flags and runs' folders name, told from small files before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.config import TrainConfig
from shared.data.tokenization import PromptInputs
from shared.diffusion.schedule import NoiseSchedule
from shared.generate.conditions import ConditionKind
from shared.generate.controlnets import NamedControlNet, with_channels
from shared.generate.options import Annotation, GenerateConfig
from shared.generate.trained_run import OF_BASE_MODEL, TrainedRun, run_of, trained_unet
from shared.models.base_model import check_base_model
from shared.models.configs import (
    AutoencoderKLConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    read_config,
)
from shared.models.source import ModelSource, base_source, shown_name, vae_source
from shared.models.xl import is_xl
from shared.prepare_data.conditions import check_available
from shared.run.setup import prompt_inputs_of
from shared.untrusted import shown
from shared.user_errors import UserError

_USUAL_SIDE = 512  # of models whose configuration does not say


@dataclass(frozen=True, eq=False)
class NamedModels:
    """Models that belong together.

    Attributes:
        controlnets: one, or several that steer together.
        architectures: of each of these.
        conditions: of each condition image that a picture has, those of all ControlNets.
        unet: in place of the base model's, where a run trained its decoder; None otherwise.
    """

    controlnets: list[NamedControlNet]
    architectures: list[ControlNetConfig]
    conditions: list[ConditionKind]
    unet: ModelSource | None
    schedule: NoiseSchedule
    prompt_inputs: PromptInputs
    unet_config: UNet2DConditionConfig
    vae_config: AutoencoderKLConfig

    @property
    def config(self) -> TrainConfig:
        """Names the base model and the first ControlNet, as a training's configuration does."""
        return self.controlnets[0].config

    @property
    def usual_size(self) -> tuple[int, int]:
        """(height, width) that a run, or else the base model, was trained on; as diffusers' pipelines take it."""
        for controlnet in self.controlnets:
            if controlnet.run is not None:
                return controlnet.run.config.resolution, controlnet.run.config.resolution
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
    names, revisions = config.controlnet_model_name_or_path or (), config.of_each_controlnet("controlnet_revision")
    runs = [run_of(name) for name in names]
    base_model = _base_model(config, runs)
    controlnets = with_channels(
        [
            _named(config, base_model, name, revision, run)
            for name, revision, run in zip(names, revisions, runs, strict=True)
        ],
        config.conditioning_channels,
    )
    models = controlnets[0].config
    schedule = NoiseSchedule.from_source(base_source(models, "scheduler"))
    unet = check_base_model(models, schedule.config)
    for controlnet in controlnets[1:]:
        check_base_model(controlnet.config, schedule.config)
    vae = read_config(vae_source(models).file(), AutoencoderKLConfig)
    return NamedModels(
        controlnets=controlnets,
        architectures=[controlnet.architecture(unet) for controlnet in controlnets],
        conditions=_annotated([kind for each in controlnets for kind in each.conditions], config.annotate),
        unet=_trained_unet(config, controlnets, unet),
        schedule=schedule,
        prompt_inputs=prompt_inputs_of(models, is_xl=is_xl(unet)),
        unet_config=unet,
        vae_config=vae,
    )


def _annotated(kinds: list[ConditionKind], annotate: tuple[Annotation, ...] | None) -> list[ConditionKind]:
    """With what is made of photographs.

    Raises:
        UserError: there are neither as many annotations as conditions nor one, or one cannot be made here.
    """
    annotations = annotate or ("none",)
    if len(annotations) not in (1, len(kinds)):
        raise UserError(
            f"--annotate names {len(annotations)} annotations, and a picture has {len(kinds)} conditions: give one for "
            "each, none where the image is the condition, or one for all."
        )
    annotations = annotations * len(kinds) if len(annotations) == 1 else annotations
    for annotation in set(annotations):
        if annotation != "none":
            check_available(annotation)
    return [
        kind if annotation == "none" else kind._replace(annotation=annotation)
        for kind, annotation in zip(kinds, annotations, strict=True)
    ]


def _trained_unet(
    config: GenerateConfig, controlnets: Sequence[NamedControlNet], base: UNet2DConditionConfig
) -> ModelSource | None:
    """That beside a ControlNet, if there is one.

    Raises:
        UserError: it is of another architecture than the base model's, or several ControlNets have one, or a further
            one is a checkpoint that has.
    """
    names = config.controlnet_model_name_or_path or ()
    revisions = config.of_each_controlnet("controlnet_revision")
    found = [trained_unet(name, revision, config.cache_dir) for name, revision in zip(names, revisions, strict=True)]
    in_checkpoints = [each.checkpoint is not None and each.config.sd_unlocked for each in controlnets]
    of = [name for name, source, stored in zip(names, found, in_checkpoints, strict=True) if source or stored]
    if len(of) > 1:
        raise UserError(
            f"{shown(' and '.join(of))} each come with a UNet that was trained with the ControlNet, and one draws: "
            "give one of these ControlNets."
        )
    if any(in_checkpoints[1:]):
        raise UserError(f"{shown(of[0])} has a UNet's decoder that was trained with the ControlNet: name it first.")
    source = next(filter(None, found), None)
    if source is not None and read_config(source.file(), UNet2DConditionConfig) != base:
        raise UserError(
            f"The UNet in {source.name}, trained with the ControlNet, is of another architecture than the base "
            "model's: give the base model that the ControlNet was trained on."
        )
    return source


def _base_model(config: GenerateConfig, runs: Sequence[TrainedRun | None]) -> dict[str, str | None]:
    """Flags that name it: those given, or else those of the ControlNets' runs."""
    given = {name: getattr(config, name) for name in OF_BASE_MODEL}
    if given["pretrained_model_name_or_path"] is not None:
        return given
    trained = [run for run in runs if run is not None and run.config.pretrained_model_name_or_path is not None]
    if not trained:
        raise UserError(
            "--pretrained_model_name_or_path is missing, and --controlnet_model_name_or_path "
            f"{shown(' '.join(config.controlnet_model_name_or_path or ()))} is not the folder of a run whose "
            "config.yaml names it: give the base model that the ControlNet was made for."
        )
    bases = {str(run.config.pretrained_model_name_or_path): None for run in trained}
    if len(bases) > 1:
        raise UserError(
            f"The runs of these ControlNets began with different base models ({', '.join(map(shown_name, bases))}): "
            "give ControlNets of one, or say with --pretrained_model_name_or_path which one draws."
        )
    return trained[0].base_model() | {name: value for name, value in given.items() if value is not None}


def _named(
    config: GenerateConfig, base_model: dict[str, str | None], name: str, revision: str | None, run: TrainedRun | None
) -> NamedControlNet:
    """By the names that a training's configuration has."""
    named: dict[str, Any] = {"controlnet_model_name_or_path": name, "controlnet_revision": revision}
    if run is not None and run.checkpoint is not None:
        named = run.beginning()
    models = TrainConfig(
        **base_model | named,
        cache_dir=config.cache_dir,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
        enable_xformers_memory_efficient_attention=config.enable_xformers_memory_efficient_attention,
        allow_tf32=config.allow_tf32,
        ccache=config.ccache,
    )
    return NamedControlNet(models, run)
