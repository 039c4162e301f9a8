"""The configuration as others may see it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from shared.config.flags import Flag
from shared.config.options import FLAGS, TrainConfig
from shared.outgoing.redaction import masked, redacted


def public_config(config: TrainConfig) -> TrainConfig:
    """Without what addresses hold of secrets. (`to_yaml` leaves the flags out that are secret as a whole.)"""
    texts = [flag.name for flag in FLAGS.values() if flag.kind is str and not flag.is_prompt]
    return dataclasses.replace(config, **{name: _redacted(getattr(config, name)) for name in texts})


def public_values(config: Any, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """What was given for each flag, without what addresses and prompts hold of secrets."""
    values = dataclasses.asdict(config)
    for name, flag in flags.items():
        if flag.kind is str:
            values[name] = _public(values[name], is_prompt=flag.is_prompt)
    return values


def _public(value: Any, *, is_prompt: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_public(item, is_prompt=is_prompt) for item in value)
    if not isinstance(value, str):
        return value
    return masked(value) if is_prompt else redacted(value)


def _redacted(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(redacted(item) for item in value)
    return redacted(value) if isinstance(value, str) else value
