"""A ControlNet training of diffusers' and transformers' PyTorch models, for comparisons."""

from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from flax_trainer.base_models import ModelDefs
from flax_trainer.models.params import from_torch_layout


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).movedim(-1, 1).float()


class TorchReference:
    """A ControlNet training of diffusers' models, written as its guide describes it."""

    def __init__(self, base_model: Path):
        self.vae = diffusers.AutoencoderKL.from_pretrained(base_model / "vae")
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
        self.text_encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder")
        self.text_encoder_2 = None
        if (base_model / "text_encoder_2").exists():
            self.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(base_model / "text_encoder_2")
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(base_model / "scheduler")
        self.controlnet = diffusers.ControlNetModel.from_unet(self.unet)
        self.unet.requires_grad_(False)

    @torch.no_grad()
    def encoded(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """What the frozen encoders make of a batch, by the names of a batch's second form; images channels first."""
        posterior = self.vae.encode(channels_first(batch["pixel_values"]) / 127.5 - 1).latent_dist
        encoded = {"latent_mean": posterior.mean, "latent_std": posterior.std}
        ids = torch.from_numpy(batch["input_ids"]).long()
        if self.text_encoder_2 is None:
            return encoded | {"prompt_embeds": self.text_encoder(ids)[0]}
        # As StableDiffusionXLPipeline.encode_prompt.
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(torch.from_numpy(batch["input_ids_2"]).long(), output_hidden_states=True)
        return encoded | {
            "prompt_embeds": torch.concat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1),
            "pooled_prompt_embeds": second[0],
        }

    def in_second_form(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With latents and embeddings in place of pixels and token ids."""
        encoders_read = ("pixel_values", "input_ids", "input_ids_2")
        return {name: value for name, value in batch.items() if name not in encoders_read} | {
            name: (value.movedim(1, -1) if value.ndim == 4 else value).numpy()
            for name, value in self.encoded(batch).items()
        }

    def loss(self, batch: dict[str, np.ndarray], *, controlled: bool = True) -> torch.Tensor:
        encoded = self.encoded(batch)
        latents = encoded["latent_mean"] + encoded["latent_std"] * channels_first(batch["vae_noise"])
        latents = latents * self.vae.config.scaling_factor
        text, added = encoded["prompt_embeds"], None
        if "pooled_prompt_embeds" in encoded:
            added = {"text_embeds": encoded["pooled_prompt_embeds"], "time_ids": torch.from_numpy(batch["time_ids"])}
        noise, timesteps = channels_first(batch["noise"]), torch.from_numpy(batch["timesteps"]).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        residuals = {}
        if controlled:
            condition = channels_first(batch["conditioning_pixel_values"]) / 255
            down, mid = self.controlnet(noisy, timesteps, text, condition, added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        prediction = self.unet(noisy, timesteps, text, added_cond_kwargs=added, **residuals).sample
        return (prediction - noise).square().mean()

    def controlnet_params(self, defs: ModelDefs) -> dict[str, np.ndarray]:
        """Its values now, in this project's layouts."""
        return _in_layouts(defs, {name: value.detach() for name, value in self.controlnet.named_parameters()})

    def controlnet_gradients(self, defs: ModelDefs) -> dict[str, np.ndarray]:
        return _in_layouts(defs, {name: value.grad for name, value in self.controlnet.named_parameters()})


def _in_layouts(defs: ModelDefs, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    layouts = defs.controlnet.layouts
    return {name: from_torch_layout(value.numpy(), layouts[name]).copy() for name, value in values.items()}
