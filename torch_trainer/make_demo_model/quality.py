"""How good the made model is, in figures: what its autoencoder keeps of circles, and how its pictures follow captions.

Axes: N pictures, B batch, C channels, H height, W width.
"""

from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UniPCMultistepScheduler

from shared.data.sources.circles import Circle
from shared.evaluation.circles import measure, segment, summarise
from torch_trainer.make_demo_model.autoencoder import encode
from torch_trainer.make_demo_model.circles import Circles

_NUM_INFERENCE_STEPS = 20  # as the trainers' validation


def reconstruction_quality(vae: AutoencoderKL, circles: Circles) -> dict[str, float]:
    """The figures of `shared.evaluation.circles.summarise` for these circles, encoded and decoded again."""
    means_NCHW, _ = encode(vae, circles.pixels_NCHW)
    with torch.no_grad():
        decoded_NCHW = torch.cat([vae.decode(means_BCHW).sample for means_BCHW in means_NCHW.split(64)])
    pixels_NCHW = ((decoded_NCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pictures = zip(pixels_NCHW.permute(0, 2, 3, 1).numpy(), circles.truths, strict=True)
    return summarise([measure(picture_HWC, truth) for picture_HWC, truth in pictures])


def caption_quality(
    pipeline: StableDiffusionPipeline, truths: list[Circle], guidance_scale: float, seed: int
) -> dict[str, float]:
    """What the pipeline draws for these circles' captions, with the trainers' validation sampler; it chooses the place.

    Returns:
        The figures of `summarise`, where `circle_iou` is measured against the round disc of the drawn disc's own area
        and centre: 1 is perfectly round.
    """
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures_NHWC = pipeline(
        [truth.caption for truth in truths],
        num_inference_steps=_NUM_INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    pictures = zip(np.round(pictures_NHWC * 255).astype(np.uint8), truths, strict=True)
    return summarise([measure(picture_HWC, _where_drawn(picture_HWC, truth)) for picture_HWC, truth in pictures])


def _where_drawn(picture_HWC: np.ndarray, truth: Circle) -> Circle:
    """The asked circle, moved and resized to the disc in the picture; as it is, where the picture has none."""
    disc_HW = segment(picture_HWC).disc_HW
    if not disc_HW.any():
        return truth
    y, x = (coordinates.mean() + 0.5 for coordinates in np.nonzero(disc_HW))
    radius = float(np.sqrt(disc_HW.sum() / np.pi))
    return replace(truth, centre_xy=(float(x), float(y)), radius=radius)
