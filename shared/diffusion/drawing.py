"""What is fixed for all pictures that are drawn together, whichever backend draws them."""

from dataclasses import dataclass

from shared.config import TrainConfig
from shared.diffusion.control import FULL_CONTROL, Control
from shared.diffusion.samplers import SamplerPlan, validation_plan
from shared.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Drawing:
    """How pictures are drawn.

    Attributes:
        height, width: of the pictures, in pixels.
        seed: with a picture's number it decides the noise that the picture starts from.
        guidance_scale: of classifier-free guidance; 1 or less is none.
        negative_prompt: what guidance leads away from. Where None it is the empty text, or zeros where the base model
            (`PromptInputs.zeros_for_empty_prompt`) has it so.
    """

    plan: SamplerPlan
    height: int
    width: int
    seed: int
    guidance_scale: float
    control: Control = FULL_CONTROL
    negative_prompt: str | None = None

    @classmethod
    def of_training(cls, config: TrainConfig, schedule: NoiseSchedule) -> "Drawing":
        """Of the pictures made while a ControlNet is trained."""
        return cls(validation_plan(schedule), config.resolution, config.resolution, config.seed, config.guidance_scale)

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1
