"""The configuration as others may see it."""

import dataclasses

from shared.config.options import TrainConfig
from shared.redaction import redacted


def public_config(config: TrainConfig) -> TrainConfig:
    """Without what addresses hold of secrets. (`to_yaml` leaves the flags out that are secret as a whole.)"""
    if config.train_shards is None:
        return config
    return dataclasses.replace(config, train_shards=tuple(map(redacted, config.train_shards)))
