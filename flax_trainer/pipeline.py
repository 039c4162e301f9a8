"""diffusers' ControlNet pipelines in JAX: called as they are, and the same pictures from the same noise."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import PIL.Image

from flax_trainer.evaluation.artist import PlacedModels, place_models
from flax_trainer.evaluation.image_sampler import ImageSampler
from shared.config.validation import check_values
from shared.generate.command import check_what_goes_together
from shared.generate.conditions import as_conditions
from shared.generate.models import NamedModels, find_models
from shared.generate.options import GENERATE_FLAGS, OF_EACH_CONTROLNET, GenerateConfig
from shared.generate.preparation import drawing_of
from shared.generate.requests import pair
from shared.user_errors import UserError

Picture = PIL.Image.Image | np.ndarray
"""As Pillow has it, or uint8 [H,W,3], RGB."""


class PipelineOutput(NamedTuple):
    """The pictures, in the order of prompts and conditions."""

    images: list[PIL.Image.Image]


class FlaxStableDiffusionControlNetPipeline:
    """Draws with a ControlNet on all local devices; for Stable Diffusion 1.x, 2.x and XL, as the base model is.

    It compiles for every new size, number of steps, scheduler and strength; seeds, prompts and conditions may change.
    """

    def __init__(self, config: GenerateConfig, named: NamedModels, placed: PlacedModels):
        """`config` has what holds for all calls."""
        self._config, self._named, self._placed = config, named, placed
        self._samplers: dict[tuple[Any, ...], ImageSampler] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        controlnet: str | Path | Sequence[str | Path],
        scheduler: str = "unipc",
        **options: Any,
    ) -> Self:
        """Load models onto the devices.

        Args:
            pretrained_model_name_or_path: the base model; without it, that of the run whose folder `controlnet` is.
            controlnet: a run's folder or a checkpoint in it, a folder in diffusers' layout, or a name on the Hub; or
                several that steer together.
            scheduler: unipc, ddim, euler or dpmsolver++.
            options: other flags of `python3 -m flax_trainer.generate`, such as `revision="fp16"` or
                `mixed_precision="bf16"`; they hold for all calls.

        Raises:
            UserError: a model is missing or damaged, or they do not belong together.
        """
        base = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        names = [controlnet] if isinstance(controlnet, str | Path) else controlnet
        config = GenerateConfig(
            pretrained_model_name_or_path=base,
            controlnet_model_name_or_path=tuple(map(str, names)),
            scheduler=scheduler,  # type: ignore[arg-type]  # check_values looks at it
            **_as_flags(options),
        )
        check_values(config, GENERATE_FLAGS)
        named = find_models(config)
        return cls(config, named, place_models(named))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
        **options: Any,
    ) -> PipelineOutput:
        """Draw; picture n starts from noise that depends on the seed and n alone.

        Args:
            prompt, image: as many of one as of the other, or one of either. Where there are several conditions, of one
                ControlNet or of several, an image is a sequence of pictures, one of each.
            options: `num_images_per_prompt`, `negative_prompt`, `seed`, `num_inference_steps` (20), `guidance_scale`,
                `guess_mode`, `height` and `width`, which otherwise are the first image's, and for all ControlNets or as
                a list for each `controlnet_conditioning_scale`, `control_guidance_start` and `_end`.

        Raises:
            UserError: values that mean nothing, or that do not go together.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        kinds = self._named.conditions
        groups = [list(map(_as_pillow, group)) for group in _groups(image, len(kinds))]
        if not {"height", "width", "resolution"} & options.keys():
            options |= {"height": groups[0][0].height, "width": groups[0][0].width}
        config = dataclasses.replace(self._config, **_as_flags(options))
        check_values(config, GENERATE_FLAGS)
        check_what_goes_together(config)
        requests = pair(prompts, len(groups), config.num_images_per_prompt)
        sampler = self._sampler(config, len(requests))
        height, width = sampler.drawing.height, sampler.drawing.width
        conditions_GHWN = np.stack([as_conditions(group, kinds, height, width) for group in groups])
        drawn_RHWC = sampler(
            self._placed.params,
            self._placed.frozen,
            [request.prompt for request in requests],
            conditions_GHWN[[request.condition for request in requests]],
            [request.number for request in requests],
        )
        return PipelineOutput([PIL.Image.fromarray(image_HWC) for image_HWC in drawn_RHWC])

    def _sampler(self, config: GenerateConfig, pictures: int) -> ImageSampler:
        """With the program of an earlier call, where that can draw these pictures too."""
        drawing = drawing_of(config, self._named)
        per_device = min(config.batch_size, -(-pictures // jax.device_count()))
        program = dataclasses.replace(config, seed=0, negative_prompt=None, num_images_per_prompt=1)
        key = (program, config.negative_prompt is None, per_device)
        if key not in self._samplers:
            self._samplers[key] = ImageSampler(
                self._placed.engine,
                self._placed.models,
                self._named.prompt_inputs,
                drawing,
                images_per_device=per_device,
            )
        return self._samplers[key].like(drawing)


FlaxStableDiffusionXLControlNetPipeline = FlaxStableDiffusionControlNetPipeline
"""The name that diffusers has for it; which kind of model it is, its folder says."""


def _as_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """With what may be told for each ControlNet as the flags have it."""
    told = dict(options)
    for name in options.keys() & set(OF_EACH_CONTROLNET):
        value = options[name]
        told[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
    return told


def _groups(
    image: Picture | Sequence[Picture] | Sequence[Sequence[Picture]], conditions: int
) -> list[Sequence[Picture]]:
    """One picture of each condition in each."""
    images: list[Picture | Sequence[Picture]] = [image] if isinstance(image, Picture) else list(image)
    pictures = [one for one in images if isinstance(one, Picture)]
    is_one_group = conditions > 1 and len(pictures) == len(images)
    groups: list[Sequence[Picture]] = [pictures]
    if not is_one_group:
        groups = [[one] if isinstance(one, Picture) else one for one in images]
    for group in groups:
        if len(group) != conditions:
            raise UserError(
                f"An image of {len(group)} pictures was given, and there are {conditions} conditions: give a picture "
                "of each."
            )
    return groups


def _as_pillow(picture: Picture) -> PIL.Image.Image:
    return PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
