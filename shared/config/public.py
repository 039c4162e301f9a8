"""The configuration as others may see it."""

import dataclasses
from typing import Any

from shared.config.options import FLAGS, TrainConfig
from shared.redaction import redacted

_PROMPTS = ("validation_prompt",)  # any text, and no address


def public_config(config: TrainConfig) -> TrainConfig:
    """Without what addresses hold of secrets. (`to_yaml` leaves the flags out that are secret as a whole.)"""
    texts = [flag for flag in FLAGS.values() if flag.kind is str and flag.name not in _PROMPTS]
    given: dict[str, Any] = {
        flag.name: getattr(config, flag.name) for flag in texts if getattr(config, flag.name) is not None
    }
    return dataclasses.replace(config, **{name: _redacted(value) for name, value in given.items()})


def _redacted(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return redacted(value) if isinstance(value, str) else tuple(redacted(item) for item in value)
