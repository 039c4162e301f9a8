"""The third phase: a UNet, and the text encoder with it, trained to denoise latents (Rombach et al. 2022, eq. 3).

Axes: N pictures, B batch, C channels, H W latent height and width, L tokens.
"""

import copy
import logging
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from torch_trainer.make_demo_model.schedule import one_cycle

logger = logging.getLogger("make_demo_model")

_BATCH_SIZE = 64
_LEARNING_RATE = 1e-3
_EMA_DECAY = 0.998
_CAPTION_DROPOUT = 0.1  # for classifier-free guidance (Ho and Salimans 2022)
_LOG_EVERY = 100

_UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,  # the number of heads, under the name that Stable Diffusion gives it
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Examples:
    """What is learnt: means and standard deviations of scaled latents, captions and the empty caption, tokenized."""

    means_NCHW: torch.Tensor
    stds_NCHW: torch.Tensor
    input_ids_NL: torch.Tensor
    empty_ids_L: torch.Tensor

    def draw_batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random (latents [B,C,H,W], token ids [B,L]); some captions are the empty one."""
        chosen_B = torch.randint(len(self.input_ids_NL), (size,))
        means_BCHW, stds_BCHW = self.means_NCHW[chosen_B], self.stds_NCHW[chosen_B]
        dropped_B1 = torch.rand(size, 1) < _CAPTION_DROPOUT
        input_ids_BL = torch.where(dropped_B1, self.empty_ids_L, self.input_ids_NL[chosen_B])
        return means_BCHW + stds_BCHW * torch.randn_like(stds_BCHW), input_ids_BL


def train_text_to_image(
    examples: Examples, text_encoder: CLIPTextModel, noise_scheduler: DDPMScheduler, steps: int, seed: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The exponential moving averages of a UNet that predicts v, and of the text encoder, which learns on.

    Salimans and Ho 2022, appendix D: v counts errors under strong noise, where caption and place are decided, as much
    as those under weak noise; errors of the predicted noise hardly count there.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(cross_attention_dim=text_encoder.config.hidden_size, **_UNET_CONFIG)
    average_unet, average_text_encoder = copy.deepcopy(unet), copy.deepcopy(text_encoder)
    averages = [*average_unet.parameters(), *average_text_encoder.parameters()]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = one_cycle(optimizer, steps)
    logged_losses = []
    for step in range(1, steps + 1):
        latents_BCHW, input_ids_BL = examples.draw_batch(_BATCH_SIZE)
        noise_BCHW = torch.randn_like(latents_BCHW)
        timesteps_B = torch.randint(noise_scheduler.config.num_train_timesteps, (_BATCH_SIZE,))
        noisy_BCHW = noise_scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
        text_BLD = text_encoder(input_ids_BL).last_hidden_state
        predicted_BCHW = unet(noisy_BCHW, timesteps_B, text_BLD).sample
        velocity_BCHW = noise_scheduler.get_velocity(latents_BCHW, noise_BCHW, timesteps_B)
        loss = torch.nn.functional.mse_loss(predicted_BCHW, velocity_BCHW)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1.0 - _EMA_DECAY)
        logged_losses.append(loss.item())
        if step % _LOG_EVERY == 0 or step == steps:
            logger.info("UNet step %d: loss %.4f", step, sum(logged_losses) / len(logged_losses))
            logged_losses.clear()
    return average_unet.eval(), average_text_encoder.eval()
