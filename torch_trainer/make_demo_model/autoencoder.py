"""The first phase: a variational autoencoder (Kingma and Welling 2014) for circles, eight times smaller each way.

Axes: N pictures, B batch, C channels, H height, W width.
"""

import logging

import torch
from diffusers import AutoencoderKL

from torch_trainer.make_demo_model.circles import normalise
from torch_trainer.make_demo_model.schedule import one_cycle

logger = logging.getLogger("make_demo_model")

_BATCH_SIZE = 16
_LEARNING_RATE = 2e-3
_HUBER_BETA = 0.2  # in units of [-1, 1]: squared below 25 of 255 grey levels, absolute above
_KL_WEIGHT = 3e-4
_FIRST_LOG_VARIANCE = -5.0
_LOG_EVERY = 100
_CONFIG = {
    "sample_size": 64,
    "block_out_channels": [8, 16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 1,
}


def train_autoencoder(pixels_NCHW: torch.Tensor, steps: int, seed: int) -> AutoencoderKL:
    """A VAE whose `scaling_factor` gives its latents of these pictures (uint8) a standard deviation of 1."""
    torch.manual_seed(seed)
    vae = _new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = one_cycle(optimizer, steps)
    for step in range(1, steps + 1):
        pixels_BCHW = normalise(pixels_NCHW[torch.randint(len(pixels_NCHW), (_BATCH_SIZE,))])
        if step <= steps // 2:  # most is learnt as well, and faster, from small pictures
            pixels_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 2)
        posterior = vae.encode(pixels_BCHW).latent_dist
        decoded_BCHW = vae.decode(posterior.sample()).sample
        reconstruction = torch.nn.functional.smooth_l1_loss(decoded_BCHW, pixels_BCHW, beta=_HUBER_BETA)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction + _KL_WEIGHT * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % _LOG_EVERY == 0 or step == steps:
            logger.info("VAE step %d: reconstruction %.4f, KL %.3f", step, reconstruction.item(), divergence.item())
    means_NCHW, stds_NCHW = encode(vae, pixels_NCHW)
    vae.register_to_config(scaling_factor=1.0 / (means_NCHW.var() + stds_NCHW.square().mean()).sqrt().item())
    return vae.eval()


def _new_autoencoder() -> AutoencoderKL:
    """Untrained, but passing the input's colours through from the first step, which saves it most of its training.

    Residual branches start at zero (Goyal et al. 2017, section 5.1) and the convolutions between them as identities, in
    as far as their channels allow. Latents start almost without noise: under noise of their own size the decoder would
    learn to ignore them.
    """
    vae = AutoencoderKL(**_CONFIG)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
        elif isinstance(module, torch.nn.Conv2d) and not name.endswith((".conv1", ".conv_out")):
            torch.nn.init.dirac_(module.weight)
    with torch.no_grad():
        vae.quant_conv.bias[_CONFIG["latent_channels"] :] = _FIRST_LOG_VARIANCE
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the latents of uint8 pictures, not scaled."""
    posteriors = [vae.encode(normalise(pixels_BCHW)).latent_dist for pixels_BCHW in pixels_NCHW.split(64)]
    return torch.cat([posterior.mean for posterior in posteriors]), torch.cat(
        [posterior.std for posterior in posteriors]
    )
