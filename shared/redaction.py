"""Addresses without what may be secret in them: for logs, checkpoints, model cards and trackers."""

import dataclasses
import hashlib
from urllib.parse import urlsplit, urlunsplit

from shared.config import TrainConfig


def redacted(location: str) -> str:
    """The location without credentials: URLs lose user, password and query, shell commands all but their first word.

    A shell command keeps a digest, so that two commands can still be told apart. Anything else stays as it is.
    """
    if location.lower().startswith("pipe:"):
        command = location[len("pipe:") :].split()
        digest = hashlib.sha256(location.encode()).hexdigest()[:8]
        return f"pipe:{command[0] if command else ''} … (sha256 {digest})"
    if "://" not in location:
        return location
    parts = urlsplit(location)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def public_config(config: TrainConfig) -> TrainConfig:
    """The configuration as others may see it. (`to_yaml` leaves the flags out that are secret as a whole.)"""
    if config.train_shards is None:
        return config
    return dataclasses.replace(config, train_shards=tuple(map(redacted, config.train_shards)))
