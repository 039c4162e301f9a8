"""The configuration as others may see it."""

import dataclasses
from typing import Any

from shared.config.options import FLAGS, TrainConfig
from shared.outgoing.redaction import redacted


def public_config(config: TrainConfig) -> TrainConfig:
    """Without what addresses hold of secrets. (`to_yaml` leaves the flags out that are secret as a whole.)"""
    texts = [flag.name for flag in FLAGS.values() if flag.kind is str and not flag.is_prompt]
    return dataclasses.replace(config, **{name: _redacted(getattr(config, name)) for name in texts})


def _redacted(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(redacted(item) for item in value)
    return redacted(value) if isinstance(value, str) else value
