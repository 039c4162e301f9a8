"""Images from the weights in training, as users will sample them, without a second pipeline in memory.

Axes: R images asked for, B images at once, H W height and width (pixels or latents), C channels, L tokens.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch.profiler import record_function

from shared.data.tokenization import PromptInputs
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import guided, initial_latents, initial_state, sampler_step
from torch_trainer.base_models import BaseModels, Prompt
from torch_trainer.training.step import control_residuals, controlled_prediction, encode_captions, normalise_condition


class ImageSampler:
    """ControlNet sampling with classifier-free guidance, as diffusers' pipelines for Stable Diffusion (XL) do it."""

    def __init__(
        self,
        models: BaseModels,
        drawing: Drawing,
        prompt_inputs: PromptInputs,
        device: torch.device,
        *,
        images_at_once: int,
    ):
        self._models, self._drawing, self._device = models, drawing, device
        self._prompt_inputs = prompt_inputs.of_whole_images(drawing.height, drawing.width)
        self._latent_shape = models.latent_shape(drawing.height, drawing.width)
        self._images_at_once = images_at_once

    def __call__(self, prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> torch.Tensor:
        """uint8 [R,H,W,C], one image for each prompt with its condition (uint8).

        An image starts from latents that depend on the seed and its index alone, so images of different steps, numbers
        of processes and backends can be compared.
        """
        images = []
        for start in range(0, len(prompts), self._images_at_once):
            part = slice(start, start + self._images_at_once)
            images.append(self._sample(prompts[part], conditions_RHWC[part], indices[part]))
        return torch.cat(images)

    def _sample(self, prompts: list[str], conditions_BHWC: np.ndarray, indices: list[int]) -> torch.Tensor:
        models, drawing, plan, control = self._models, self._drawing, self._drawing.plan, self._drawing.control
        prompt = self._encode(prompts)
        condition_BCHW = normalise_condition(torch.from_numpy(conditions_BHWC).to(self._device).permute(0, 3, 1, 2))
        # Unconditional first: one forward pass serves both.
        copies = 2 if drawing.is_guided else 1
        if not control.only_conditional:
            condition_BCHW = torch.cat([condition_BCHW] * copies)
        controlnets = (models.controlnet, *models.more_controlnets)
        conds_BCHW = self._of_each(models.as_input(condition_BCHW))
        latents_BHWC = torch.from_numpy(initial_latents(drawing.seed, indices, self._latent_shape)).to(self._device)
        state = initial_state(plan, latents_BHWC.permute(0, 3, 1, 2))
        for step, scales in zip(plan.steps(), control.scales(plan.num_inference_steps).tolist(), strict=True):
            sample_BCHW = models.as_input(torch.cat([state.sample] * copies))
            timesteps_B = torch.full((len(sample_BCHW),), step.timestep, device=self._device)
            inputs = (sample_BCHW, timesteps_B, prompt)
            residuals_of_each = [
                control_residuals(
                    *(models, controlnet, *inputs, cond_BCHW), conditioning_scale=scale, graded=strength.graded
                )
                for controlnet, cond_BCHW, strength, scale in zip(
                    controlnets, conds_BCHW, control.strengths, scales, strict=True
                )
            ]
            residuals = [reduce(torch.add, of_all) for of_all in zip(*residuals_of_each, strict=True)]
            output_BCHW = controlled_prediction(models, *inputs, residuals)
            if drawing.is_guided:
                unconditional_BCHW, conditional_BCHW = output_BCHW.chunk(2)
                output_BCHW = guided(unconditional_BCHW, conditional_BCHW, drawing.guidance_scale)
            state = sampler_step(plan, step, state, output_BCHW)
        return self._decode(state.sample)

    def _of_each(self, condition_BCHW: torch.Tensor) -> Sequence[torch.Tensor]:
        """What each ControlNet takes of the conditions of all, which lie side by side."""
        more = self._models.more_controlnets
        if not more:  # in training, whatever divides its work hides its configuration
            return [condition_BCHW]
        channels = [each.config.conditioning_channels for each in (self._models.controlnet, *more)]
        return condition_BCHW.split(channels, dim=1)

    def _encode(self, prompts: list[str]) -> Prompt:
        """With the prompts before them that they are guided away from."""
        negative = [self._drawing.negative_prompt or ""] * len(prompts) if self._drawing.is_guided else []
        arrays = self._prompt_inputs(negative + prompts)
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        prompt = encode_captions(self._models, inputs)
        if self._drawing.negative_prompt is None and self._prompt_inputs.zeros_for_empty_prompt:
            assert prompt.added_cond_kwargs is not None
            for encoded in (prompt.encoder_hidden_states_BLD, prompt.added_cond_kwargs["text_embeds"]):
                encoded[: len(negative)] = 0
        return prompt

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        scaled_BCHW = self._models.as_vae_input(latents_BCHW / self._models.vae.config.scaling_factor)
        with record_function("vae"):
            pixels_BCHW = self._models.vae.decode(scaled_BCHW).sample.float()
        images_BCHW = ((pixels_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return images_BCHW.permute(0, 2, 3, 1).contiguous()
