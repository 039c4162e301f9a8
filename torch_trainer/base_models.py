"""Everything that a run reads from its base model, as diffusers' and transformers' PyTorch modules."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from shared.config import TrainConfig
from shared.models.compatibility import check_models_fit
from shared.models.configs import (
    Architecture,
    AutoencoderKLConfig,
    CLIPTextConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    read_config,
)
from shared.models.configs.reading import AnyArchitecture
from shared.models.fitting import fitting_weights
from shared.models.initialisation import ModuleKind, initial_values
from shared.models.source import CONFIG_FILE, ModelSource, base_source, controlnet_source, vae_source
from shared.models.trained_parts import UNET_FOLDER, is_decoder, only_mid_control_notice
from shared.models.weight_files import DIFFUSERS, TRANSFORMERS
from shared.models.xl import is_xl, vae_in_float32
from shared.untrusted import foreign_library, shown

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # folders of a base model


class Prompt(NamedTuple):
    """What the text encoders made of captions. `added_cond_kwargs` is SDXL's, tensors of axis B first.

    Axes: B batch, L tokens, D features.
    """

    encoder_hidden_states_BLD: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] | None = None

    def after(self, rows: int) -> "Prompt":
        """Of the captions that follow the first ones."""
        added = self.added_cond_kwargs
        if added is not None:
            added = {name: tensor[rows:] for name, tensor in added.items()}
        return Prompt(self.encoder_hidden_states_BLD[rows:], added)


@dataclass
class BaseModels:
    """The models of a run. Parameters that require gradients are trained and in float32, others in the compute dtype.

    The VAE may be in float32 (`shared.models.xl.vae_in_float32`). `text_encoder_2` is SDXL's. With `--precompute_text`
    or `--cached_data` there are no text encoders.

    Trained are the ControlNet's and, with `--sd_unlocked`, those of the UNet's decoder. `memory_format` is how feature
    maps lie in memory. `more_controlnets` draw with the first.
    """

    controlnet: Any
    unet: Any
    vae: Any
    text_encoder: Any
    dtype: torch.dtype
    sd_unlocked: bool
    memory_format: torch.memory_format = torch.contiguous_format
    text_encoder_2: Any | None = None
    more_controlnets: tuple[Any, ...] = ()

    @property
    def trained(self) -> list[Any]:
        """The models of which something is trained, as they are prepared for it."""
        return [self.controlnet, self.unet] if self.sd_unlocked else [self.controlnet]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def as_input(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """In the dtype and the memory order that the models compute in."""
        return maps_BCHW.to(self.dtype, memory_format=self.memory_format)

    def as_vae_input(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """As `as_input`, for the VAE."""
        return maps_BCHW.to(next(self.vae.parameters()).dtype, memory_format=self.memory_format)

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(H, W, C) of the latents of an image, of a square one without `width`."""
        factor = self.vae_scale_factor
        return height // factor, (width or height) // factor, self.vae.config.latent_channels


def load_base_models(config: TrainConfig, dtype: torch.dtype, *, unet_source: ModelSource | None = None) -> BaseModels:
    """Read the UNet, VAE and text encoders, and the ControlNet, which starts from the UNet's encoder if none is named.

    `unet_source` is of a UNet in place of the base model's.

    Raises:
        UserError: something is missing, does not fit its configuration or the others, or is not supported.
    """
    base = str(config.pretrained_model_name_or_path)
    unet, unet_config = _load_unet(config, unet_source)
    text_configs = [_text_config(config, part) for part in TEXT_ENCODERS[: 2 if is_xl(unet_config) else 1]]
    vae, vae_config = load_model(AutoencoderKL, AutoencoderKLConfig, vae_source(config))
    controlnet, controlnet_config = _load_controlnet(config, unet, unet_config)
    check_models_fit(
        base,
        unet_config,
        text_configs[0],
        vae_config,
        controlnet_config,
        text_configs[1] if is_xl(unet_config) else None,
        config.control_channels,
    )
    text_encoders = TextEncoders(None)
    if not config.encodes_text_beforehand:
        text_encoders = load_text_encoders(config, dtype, is_xl=is_xl(unet_config))
    unet.eval()
    for name, param in unet.named_parameters():
        is_trained = config.sd_unlocked and is_decoder(name)
        param.requires_grad_(is_trained)
        param.data = param.data.to(torch.float32 if is_trained else dtype)
    vae.requires_grad_(False).eval().to(torch.float32 if vae_in_float32(unet_config, vae_config) else dtype)
    if config.only_mid_control:
        if any(param.any() for param in controlnet.controlnet_down_blocks.parameters()):
            logger.info(only_mid_control_notice(str(config.controlnet_model_name_or_path)))
        silence_down_residuals(controlnet)
    first, second = text_encoders
    return BaseModels(controlnet.train(), unet, vae, first, dtype, config.sd_unlocked, text_encoder_2=second)


class TextEncoders(NamedTuple):
    """The text encoders alone, by the names of `BaseModels`."""

    text_encoder: Any
    text_encoder_2: Any | None = None


def load_text_encoders(config: TrainConfig, dtype: torch.dtype, *, is_xl: bool) -> TextEncoders:
    """The base model's, in the compute dtype.

    Raises:
        UserError: one is not there, or does not fit its configuration.
    """
    first = load_model(CLIPTextModel, CLIPTextConfig, base_source(config, TEXT_ENCODERS[0]))[0]
    if not is_xl:
        return TextEncoders(_frozen(first, dtype))
    source = base_source(config, TEXT_ENCODERS[1])
    second = load_model(CLIPTextModelWithProjection, CLIPTextConfig, source)[0]
    return TextEncoders(_frozen(first, dtype), _frozen(second, dtype))


def _frozen(model: Any, dtype: torch.dtype) -> Any:
    model.requires_grad_(False).eval()
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


def _text_config(config: TrainConfig, part: str) -> CLIPTextConfig:
    return read_config(base_source(config, part).file(), CLIPTextConfig)


def load_unet(config: TrainConfig) -> Any:
    """The base model's UNet, in float32.

    Raises:
        UserError: it is not there, or does not fit its configuration.
    """
    return _load_unet(config)[0]


def _load_unet(config: TrainConfig, source: ModelSource | None = None) -> tuple[Any, UNet2DConditionConfig]:
    return load_model(UNet2DConditionModel, UNet2DConditionConfig, source or base_source(config, UNET_FOLDER))


class _SilentConvolution(torch.nn.Conv2d):
    """Has the zeros of an untrained zero convolution, which are not trained, and saves the work of computing zeros."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=1)
        for param in self.parameters():
            torch.nn.init.zeros_(param.requires_grad_(False))

    def forward(self, states_BCHW: torch.Tensor) -> torch.Tensor:
        return states_BCHW.new_zeros((1, 1, 1, 1))


def silence_down_residuals(controlnet: Any) -> None:
    """The zeros are in the saved ControlNet too, for diffusers adds the residuals of all blocks."""
    controlnet.controlnet_down_blocks = torch.nn.ModuleList(
        _SilentConvolution(convolution.in_channels) for convolution in controlnet.controlnet_down_blocks
    )


def _load_controlnet(
    config: TrainConfig, unet: Any, unet_config: UNet2DConditionConfig
) -> tuple[Any, ControlNetConfig]:
    source = controlnet_source(config)
    if source is not None:
        return load_model(ControlNetModel, ControlNetConfig, source)
    channels = config.control_channels
    controlnet_config = ControlNetConfig.from_unet_config(unet_config, conditioning_channels=channels)
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=channels)
    # What is no copy and not zero, diffusers leaves to chance.
    for name, module in controlnet.controlnet_cond_embedding.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            kind = ModuleKind.ZERO if name == "conv_out" else ModuleKind.AFFINE
            shapes = {key: tuple(param.shape) for key, param in module.named_parameters()}
            values = initial_values(config.seed, f"controlnet_cond_embedding.{name}", kind, shapes)
            module.load_state_dict({key: torch.from_numpy(value) for key, value in values.items()})
    return controlnet, controlnet_config


def load_model(
    model_class: Any, config_class: type[AnyArchitecture], source: ModelSource
) -> tuple[Any, AnyArchitecture]:
    """A model in float32, all of its weights from the files, and its configuration.

    The libraries' own `from_pretrained` would follow what a `config.json` says to other folders and to the Hub.
    """
    names = TRANSFORMERS if issubclass(model_class, PreTrainedModel) else DIFFUSERS
    folder = source.folder(names)
    config = read_config(folder / CONFIG_FILE, config_class)
    model = _without_weights(model_class, config, folder)
    parameters = model.state_dict()
    own_names = {config.published_name(name): name for name in parameters}
    expected = {name: tuple(parameters[own].shape) for name, own in own_names.items() if name is not None}
    weights = fitting_weights(folder, names, source.variant, expected, model_class.__name__, config.published_name)
    state = {own_names[name]: torch.from_numpy(np.array(value, np.float32)) for name, value in weights}
    model.load_state_dict(state, assign=True)
    return model.eval(), config


def _without_weights(model_class: Any, config: Architecture, folder: Path) -> Any:
    """The structure that a configuration describes."""
    fields = config.to_dict()
    with (
        foreign_library(
            f"The config.json in {shown(folder)} describes no {model_class.__name__} that can be built",
            "Check that the folder holds this kind of model.",
        ),
        init_empty_weights(),
    ):
        return (
            model_class(transformers.CLIPTextConfig(**fields))
            if issubclass(model_class, PreTrainedModel)
            else model_class(**fields)
        )
