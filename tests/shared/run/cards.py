"""What a card tells, for tests."""

from typing import Any

from flax_trainer.random_model import ARCHITECTURES
from shared.models.configs import UNet2DConditionConfig
from shared.run.licence import STABLE_DIFFUSION
from shared.run.model_card import BaseKind, CardContent, kind_of


def kind(architecture: str) -> BaseKind:
    """Of a built-in one."""
    return kind_of(UNet2DConditionConfig.from_dict(ARCHITECTURES[architecture].unet))


def content(**changes: Any) -> CardContent:
    values: dict[str, Any] = {
        "facts": {"Optimizer steps": 12},
        "command": "python3 train_flax.py --seed 3",
        "pictures": [],
        "kind": kind("sd15"),
        "licence": STABLE_DIFFUSION,
    }
    return CardContent(**(values | changes))
