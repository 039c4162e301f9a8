"""Everything that a run reads from its base model: parameters on the host, structures, noise schedule."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.models import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ControlNetConfig,
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
    UNet2DConditionConfig,
)
from flax_trainer.models.controlnet import controlnet_params_from_unet
from flax_trainer.models.kernels.attention import WITHOUT_SPLASH, AttentionKernel, attention_kernel
from flax_trainer.models.kernels.attention_trial import kernel_that_runs
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import HostParams, ModelDef, split
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from shared.models.compatibility import check_models_fit
from shared.models.source import ModelSource, base_source, controlnet_source, vae_source
from shared.models.trained_parts import (
    DOWN_RESIDUALS,
    is_decoder,
    only_mid_control_notice,
    with_unet_prefix,
)
from shared.models.xl import is_xl, vae_in_float32

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}


class ModelConfigs(NamedTuple):
    """The architectures of a run's models."""

    unet: UNet2DConditionConfig
    controlnet: ControlNetConfig
    vae: AutoencoderKLConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig | None = None  # SDXL's
    more_controlnets: tuple[ControlNetConfig, ...] = ()  # that draw with the first

    @classmethod
    def of(
        cls,
        unet: Mapping[str, Any],
        vae: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        text_encoder_2: Mapping[str, Any] | None = None,
        conditioning_channels: int = 3,
    ) -> "ModelConfigs":
        """From the fields of their `config.json`, with the ControlNet that starts from this UNet."""
        unet_config = UNet2DConditionConfig.from_dict(unet)
        return cls(
            unet_config,
            ControlNetConfig.from_unet_config(unet_config, conditioning_channels=conditioning_channels),
            AutoencoderKLConfig.from_dict(vae),
            CLIPTextConfig.from_dict(text_encoder),
            None if text_encoder_2 is None else CLIPTextConfig.from_dict(text_encoder_2),
        )

    def vae_dtype(self, compute_dtype: Any) -> Any:
        """What the VAE computes in."""
        return jnp.float32 if vae_in_float32(self.unet, self.vae) else compute_dtype


class FrozenParams(NamedTuple):
    """Parameters that are used and not trained, in the compute dtype; numpy until they are placed.

    The VAE may be in float32 (`ModelConfigs.vae_dtype`). With `--sd_unlocked`, `unet` lacks the decoder, which is
    trained. With `--precompute_text` or `--cached_data` the text encoders' are empty, and with the latter, unless
    pictures are drawn, so is the VAE's. `more_controlnets` draw with the one that is trained.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any] = {}  # noqa: RUF012 (nothing writes to it); SDXL's
    more_controlnets: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelDefs:
    """The structures of the models of a run."""

    controlnet: ModelDef[FlaxControlNetModel]
    unet: ModelDef[FlaxUNet2DConditionModel]
    vae: ModelDef[FlaxAutoencoderKL]
    text_encoder: ModelDef[FlaxCLIPTextModel]
    text_encoder_2: ModelDef[FlaxCLIPTextModelWithProjection] | None = None
    """SDXL's; the UNet and the ControlNet of a run that has one are SDXL's, too."""
    more_controlnets: tuple[ModelDef[FlaxControlNetModel], ...] = ()

    @property
    def trained_layouts(self) -> dict[str, str]:
        """The layout (see `params.py`) of whatever may be trained, by its name in `TrainState`."""
        decoder = {name: layout for name, layout in self.unet.layouts.items() if is_decoder(name)}
        return self.controlnet.layouts | with_unet_prefix(decoder)


class Prompt(NamedTuple):
    """What the text encoders made of captions. `added_cond_kwargs` is SDXL's, arrays of axis B first.

    Axes: B batch, L tokens, D features.
    """

    encoder_hidden_states_BLD: jax.Array
    added_cond_kwargs: dict[str, jax.Array] | None = None

    def astype(self, dtype: jax.typing.DTypeLike) -> "Prompt":
        """In a compute dtype, but for the sizes in SDXL's `time_ids`: bfloat16 has no 1001."""
        added = self.added_cond_kwargs
        if added is not None:
            added = added | {"text_embeds": added["text_embeds"].astype(dtype)}
        return Prompt(self.encoder_hidden_states_BLD.astype(dtype), added)

    def zeroed(self) -> "Prompt":
        """Zeros in place of all that was made of captions; sizes stay."""
        added = self.added_cond_kwargs
        if added is not None:
            added = added | {"text_embeds": jnp.zeros_like(added["text_embeds"])}
        return Prompt(jnp.zeros_like(self.encoder_hidden_states_BLD), added)


@dataclass(frozen=True)
class BaseModels:
    """What the models of a run are, without their parameters."""

    defs: ModelDefs
    configs: ModelConfigs
    schedule: NoiseSchedule

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(H, W, C) of the latents of an image, of a square one without `width`."""
        factor = self.configs.vae.scale_factor
        return height // factor, (width or height) // factor, self.configs.vae.latent_channels


class InitialParams(NamedTuple):
    """Host arrays of a run's models: what training starts from in float32, the others in the compute dtype."""

    controlnet: HostParams
    frozen: FrozenParams
    decoder: HostParams  # of the UNet, with --sd_unlocked, else empty

    @property
    def trained(self) -> HostParams:
        """By the names that `TrainState` has for them."""
        return self.controlnet | with_unet_prefix(self.decoder)


def load_base_models(
    config: TrainConfig,
    schedule: NoiseSchedule,
    *,
    unet_source: ModelSource | None = None,
    more_controlnets: Sequence[ControlNetConfig] = (),
) -> tuple[BaseModels, InitialParams]:
    """Read the UNet, VAE and text encoders, and the ControlNet, which starts from the UNet's encoder if none is named.

    `unet_source` is of a UNet in place of the base model's. The parameters of `more_controlnets` are the caller's.

    Raises:
        UserError: something is missing, does not fit its configuration or the others, or is not supported.
    """
    configs = read_configs(config)._replace(more_controlnets=tuple(more_controlnets))
    dtype, asked_for = COMPUTE_DTYPES[config.mixed_precision or "no"], config.enable_xformers_memory_efficient_attention
    kernel = kernel_that_runs(attention_kernel(asked_for, jax.devices()[0]), dtype, asked_for=asked_for is True)
    models = define_models(config, configs, schedule, jax.devices()[0], kernel)
    _, unet = load_unet(config, unet_source)
    vae: HostParams = {}
    if config.uses_vae:
        _, vae = FlaxAutoencoderKL.load_params(vae_source(config), dtype=configs.vae_dtype(dtype))
    text_encoders: tuple[HostParams, HostParams] = ({}, {})
    if not config.encodes_text_beforehand:
        text_encoders = load_text_encoders(config, is_xl=configs.text_encoder_2 is not None)
    controlnet = _load_controlnet(config, configs.controlnet, unet)
    if config.only_mid_control:
        controlnet = _without_down_residuals(config, controlnet)
    decoder = {name: value for name, value in unet.items() if config.sd_unlocked and is_decoder(name)}
    frozen = {name: value.astype(dtype, copy=False) for name, value in unet.items() if name not in decoder}
    return models, InitialParams(controlnet, FrozenParams(frozen, vae, *text_encoders), decoder)


def load_text_encoders(config: TrainConfig, *, is_xl: bool) -> tuple[HostParams, HostParams]:
    """The base model's, in the compute dtype; the second is empty but for Stable Diffusion XL.

    Raises:
        UserError: one is missing or not supported.
    """
    dtype = COMPUTE_DTYPES[config.mixed_precision or "no"]
    _, first = FlaxCLIPTextModel.load_params(base_source(config, "text_encoder"), dtype=dtype)
    if not is_xl:
        return first, {}
    source = base_source(config, "text_encoder_2")
    return first, FlaxCLIPTextModelWithProjection.load_params(source, dtype=dtype)[1]


def read_configs(config: TrainConfig) -> ModelConfigs:
    """What `load_base_models` would load, without the weights, which need not be there.

    Raises:
        UserError: a configuration is missing or not supported.
    """
    unet = FlaxUNet2DConditionModel.load_config(base_source(config, "unet"))
    controlnet = controlnet_source(config)
    return ModelConfigs(
        unet,
        ControlNetConfig.from_unet_config(unet, conditioning_channels=config.control_channels)
        if controlnet is None
        else FlaxControlNetModel.load_config(controlnet),
        FlaxAutoencoderKL.load_config(vae_source(config)),
        FlaxCLIPTextModel.load_config(base_source(config, "text_encoder")),
        FlaxCLIPTextModelWithProjection.load_config(base_source(config, "text_encoder_2")) if is_xl(unet) else None,
    )


def define_models(
    config: TrainConfig,
    configs: ModelConfigs,
    schedule: NoiseSchedule,
    device: jax.Device,
    kernel: AttentionKernel | None = None,
) -> BaseModels:
    """The models as this run uses them on this kind of device; nothing is read and no array made.

    Args:
        kernel: of attention; what suits the device and the flags, if not given.

    Raises:
        UserError: they do not fit each other.
    """
    check_models_fit(
        str(config.pretrained_model_name_or_path),
        configs.unet,
        configs.text_encoder,
        configs.vae,
        configs.controlnet,
        configs.text_encoder_2,
        config.control_channels,
    )
    compute = Compute(
        attention=kernel or attention_kernel(config.enable_xformers_memory_efficient_attention, device),
        tpu_convolutions=device.platform == "tpu",
        fused_feed_forward=device.platform == "tpu" and device.device_kind not in WITHOUT_SPLASH,
        checkpointing=config.gradient_checkpointing_policy if config.gradient_checkpointing else None,
        gpu_normalisation=device.platform == "gpu",
    )
    controlnet = FlaxControlNetModel.abstract(
        configs.controlnet, compute=compute, only_mid_control=config.only_mid_control
    )
    unet = FlaxUNet2DConditionModel.abstract(configs.unet, compute=compute)
    vae = FlaxAutoencoderKL.abstract(configs.vae, compute=compute)
    defs = ModelDefs(
        controlnet=split(controlnet)[0],
        unet=split(unet)[0],
        vae=split(vae)[0],
        text_encoder=split(FlaxCLIPTextModel.abstract(configs.text_encoder))[0],
        text_encoder_2=None
        if configs.text_encoder_2 is None
        else split(FlaxCLIPTextModelWithProjection.abstract(configs.text_encoder_2))[0],
        more_controlnets=tuple(
            split(FlaxControlNetModel.abstract(each, compute=compute))[0] for each in configs.more_controlnets
        ),
    )
    return BaseModels(defs, configs, schedule)


def load_unet(config: TrainConfig, source: ModelSource | None = None) -> tuple[UNet2DConditionConfig, HostParams]:
    """The base model's UNet, or that of another source, as it is stored, in float32.

    Raises:
        UserError: it is missing or not supported.
    """
    return FlaxUNet2DConditionModel.load_params(source or base_source(config, "unet"))


def _load_controlnet(config: TrainConfig, controlnet_config: ControlNetConfig, unet: HostParams) -> HostParams:
    source = controlnet_source(config)
    if source is not None:
        return FlaxControlNetModel.load_params(source)[1]
    definition, abstract = split(FlaxControlNetModel.abstract(controlnet_config))
    params = controlnet_params_from_unet(unet, abstract, definition.layouts, config.seed)
    return {name: np.asarray(value) for name, value in params.items()}


def _without_down_residuals(config: TrainConfig, controlnet: HostParams) -> HostParams:
    """With zeros that stay zeros, for diffusers adds the residuals of all blocks."""
    silenced = {name: value for name, value in controlnet.items() if name.startswith(DOWN_RESIDUALS)}
    if any(value.any() for value in silenced.values()):
        logger.info(only_mid_control_notice(str(config.controlnet_model_name_or_path)))
    return controlnet | {name: np.zeros_like(value) for name, value in silenced.items()}
