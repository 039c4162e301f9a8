"""Encode images and captions once with JAX, for `--cached_data`: `python3 -m flax_trainer.cache_data --help`."""

import sys
from typing import TYPE_CHECKING

from shared.prepare_data.cache.command import cache_by_command

if TYPE_CHECKING:
    from shared.config import TrainConfig
    from shared.prepare_data.cache.encoders import Encoders


def main(words: list[str]) -> int:
    """The exit code: see `cache_by_command`."""
    return cache_by_command(words, "flax", _open_encoders)


def _open_encoders(config: "TrainConfig") -> "Encoders":
    from flax_trainer.image_encoding import open_encoders  # here, so that mistakes need not wait for JAX

    return open_encoders(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
