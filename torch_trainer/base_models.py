"""Everything that a run reads from its base model, as diffusers' and transformers' PyTorch modules."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel

from shared.config import TrainConfig
from shared.initialisation import ModuleKind, initial_values
from shared.model_files.hub_files import locate_folder
from shared.model_files.weight_files import DIFFUSERS, TRANSFORMERS, WeightNames
from shared.model_fit import check_models_fit
from shared.trained_parts import UNET_FOLDER, is_decoder, only_mid_control_notice

logger = logging.getLogger(__name__)


@dataclass
class BaseModels:
    """The models of a run. Parameters that require gradients are trained and in float32, others in the compute dtype.

    Trained are the ControlNet's and, with `--sd_unlocked`, those of the UNet's decoder.
    """

    controlnet: Any
    unet: Any
    vae: Any
    text_encoder: Any
    dtype: torch.dtype
    sd_unlocked: bool

    @property
    def trained(self) -> list[Any]:
        """The models of which something is trained, as they are prepared for it."""
        return [self.controlnet, self.unet] if self.sd_unlocked else [self.controlnet]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(H, W, C) of the latents of a square image."""
        side = resolution // self.vae_scale_factor
        return side, side, self.vae.config.latent_channels


def load_base_models(config: TrainConfig, dtype: torch.dtype) -> BaseModels:
    """Read the UNet, VAE and text encoder, and the ControlNet, which starts from the UNet's encoder if none is named.

    Raises:
        ValueError: something is missing, does not fit its configuration or the others, or is not supported.
    """
    base = str(config.pretrained_model_name_or_path)
    options = _options(config)
    unet = load_unet(config)
    text_encoder = _load(CLIPTextModel, TRANSFORMERS, base, subfolder="text_encoder", **options)
    if config.pretrained_vae_model_name_or_path is None:
        vae = _load(AutoencoderKL, DIFFUSERS, base, subfolder="vae", **options)
    else:
        vae = _load(AutoencoderKL, DIFFUSERS, config.pretrained_vae_model_name_or_path, cache_dir=config.cache_dir)
    controlnet = _load_controlnet(config, unet)
    check_models_fit(base, unet.config, text_encoder.config, vae.config, controlnet.config)
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False).eval()
        for name, param in model.named_parameters():
            is_trained = model is unet and config.sd_unlocked and is_decoder(name)
            param.requires_grad_(is_trained)
            param.data = param.data.to(torch.float32 if is_trained else dtype)
    if config.only_mid_control:
        _silence_down_residuals(config, controlnet)
    return BaseModels(controlnet.train(), unet, vae, text_encoder, dtype, config.sd_unlocked)


def load_unet(config: TrainConfig) -> Any:
    """The base model's UNet, in float32.

    Raises:
        ValueError: it is not there, or does not fit its configuration.
    """
    base = str(config.pretrained_model_name_or_path)
    return _load(UNet2DConditionModel, DIFFUSERS, base, subfolder=UNET_FOLDER, **_options(config))


def _options(config: TrainConfig) -> dict[str, Any]:
    return {"revision": config.revision, "variant": config.variant, "cache_dir": config.cache_dir}


class _SilentConvolution(torch.nn.Conv2d):
    """Has the zeros of an untrained zero convolution, which are not trained, and saves the work of computing zeros."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=1)
        for param in self.parameters():
            torch.nn.init.zeros_(param.requires_grad_(False))

    def forward(self, states_BCHW: torch.Tensor) -> torch.Tensor:
        return states_BCHW.new_zeros((1, 1, 1, 1))


def _silence_down_residuals(config: TrainConfig, controlnet: Any) -> None:
    """The zeros are in the saved ControlNet too, for diffusers adds the residuals of all blocks."""
    zero_convolutions = controlnet.controlnet_down_blocks
    if any(param.any() for param in zero_convolutions.parameters()):
        logger.info(only_mid_control_notice(str(config.controlnet_model_name_or_path)))
    controlnet.controlnet_down_blocks = torch.nn.ModuleList(
        _SilentConvolution(convolution.in_channels) for convolution in zero_convolutions
    )


def _load_controlnet(config: TrainConfig, unet: Any) -> Any:
    if config.controlnet_model_name_or_path is not None:
        return _load(
            ControlNetModel,
            DIFFUSERS,
            config.controlnet_model_name_or_path,
            revision=config.controlnet_revision,
            cache_dir=config.cache_dir,
        )
    controlnet = ControlNetModel.from_unet(unet)
    # What is no copy and not zero, diffusers leaves to chance.
    for name, module in controlnet.controlnet_cond_embedding.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            kind = ModuleKind.ZERO if name == "conv_out" else ModuleKind.AFFINE
            shapes = {key: tuple(param.shape) for key, param in module.named_parameters()}
            values = initial_values(config.seed, f"controlnet_cond_embedding.{name}", kind, shapes)
            module.load_state_dict({key: torch.from_numpy(value) for key, value in values.items()})
    return controlnet


def _load(
    model_class: Any,
    names: WeightNames,
    path_or_repo: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """A model in float32, all of its weights from the files."""
    folder = locate_folder(
        path_or_repo, names, subfolder=subfolder, revision=revision, variant=variant, cache_dir=cache_dir
    )
    try:
        model, info = model_class.from_pretrained(
            folder, variant=variant, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].strip()
        raise ValueError(
            f"{folder} cannot be loaded as a {model_class.__name__} ({reason}). Check that the folder holds this kind "
            "of model, whole, and that --variant names files that are there."
        ) from error
    # Both libraries only warn of weights that are not there, and go on with random ones.
    differences = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    if any(differences.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in differences.items() if names
        )
        raise ValueError(
            f"The weights in {folder} are not those of the {model_class.__name__} that their config.json describes: "
            f"{listed}. Check that its config.json and its weights belong together."
        )
    return model
