"""The ControlNets that are named: what each is of and which conditions it takes, told from small files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.decoded_pairs import conditioning_interpolation
from shared.data.preprocessing import MODES
from shared.generate.conditions import ConditionKind
from shared.generate.trained_run import TrainedRun
from shared.models.configs import ControlNetConfig, UNet2DConditionConfig, read_config
from shared.models.source import controlnet_source
from shared.untrusted import shown
from shared.user_errors import UserError


@dataclass(frozen=True)
class NamedControlNet:
    """A ControlNet.

    Attributes:
        config: names it and its base model as a training's configuration does, with the channels of its conditions.
        run: whose ControlNet it is, where it is the folder of one, or a checkpoint in it.
    """

    config: TrainConfig
    run: TrainedRun | None

    @property
    def checkpoint(self) -> Path | None:
        """Of a run, whose parameters take the place of those that `config` names."""
        return None if self.run is None else self.run.checkpoint

    @property
    def name(self) -> str:
        """For messages."""
        source = controlnet_source(self.config)
        return source.name if source is not None else shown(self.checkpoint)

    @property
    def conditions(self) -> list[ConditionKind]:
        """Of each condition image that it takes."""
        interpolation = conditioning_interpolation(TrainConfig() if self.run is None else self.run.config)
        return [ConditionKind(channels, interpolation) for channels in self.config.channels_of_conditions]

    @property
    def channels(self) -> int:
        """Of all its conditions, side by side. UserError where its configuration cannot be read."""
        source = controlnet_source(self.config)
        if source is None:  # it is new at the beginning of the run whose checkpoint is meant
            assert self.run is not None
            return self.run.config.control_channels
        return read_config(source.file(), ControlNetConfig).conditioning_channels

    def architecture(self, unet: UNet2DConditionConfig) -> ControlNetConfig:
        """Its configuration; of this base model's UNet, where a checkpoint of a run that began with that is meant."""
        source = controlnet_source(self.config)
        if source is None:
            return ControlNetConfig.from_unet_config(unet, conditioning_channels=self.config.control_channels)
        return read_config(source.file(), ControlNetConfig)


def with_channels(controlnets: Sequence[NamedControlNet], asked: tuple[int, ...] | None) -> list[NamedControlNet]:
    """With the channels of each condition: those asked for, or a run's several, or a ControlNet's own where it has one.

    Raises:
        UserError: nothing says which conditions make up a ControlNet's channels, or they do not.
    """
    of_each = _told(controlnets) if asked is None else _divided(controlnets, asked)
    return [
        replace(each, config=replace(each.config, conditioning_channels=channels))
        for each, channels in zip(controlnets, of_each, strict=True)
    ]


def _told(controlnets: Sequence[NamedControlNet]) -> list[tuple[int, ...]]:
    told = []
    for controlnet in controlnets:
        taken = controlnet.channels
        of_run = () if controlnet.run is None else controlnet.run.config.channels_of_conditions
        channels = of_run if len(of_run) > 1 else (taken,)
        if len(channels) == 1 and taken not in MODES:
            raise UserError(
                f"The ControlNet in {controlnet.name} takes conditions of {taken} channels (conditioning_channels in "
                "its config.json): say with --conditioning_channels of which images, 3 for each in colours and 1 for "
                "each grey one, in the order of its training."
            )
        if sum(channels) != taken:
            raise _of_other_channels([controlnet], channels)
        told.append(channels)
    return told


def _divided(controlnets: Sequence[NamedControlNet], asked: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The first for the first ControlNet, until it has as many as it takes, and so on."""
    left, divided = list(asked), []
    for controlnet in controlnets:
        taken, own = controlnet.channels, list[int]()
        while left and sum(own) < taken:
            own.append(left.pop(0))
        if sum(own) != taken:
            raise _of_other_channels(controlnets, asked)
        divided.append(tuple(own))
    if left:
        raise _of_other_channels(controlnets, asked)
    return divided


def _of_other_channels(controlnets: Sequence[NamedControlNet], channels: Sequence[int]) -> UserError:
    taken = ", ".join(f"the ControlNet in {each.name} takes {each.channels}" for each in controlnets)
    return UserError(
        f"--conditioning_channels {' '.join(map(str, channels))} come to {sum(channels)} channels, and {taken} "
        "(conditioning_channels in its config.json): give images of so many."
    )
