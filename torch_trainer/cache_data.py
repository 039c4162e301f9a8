"""Encode images and captions once with PyTorch, for `--cached_data`: `python3 -m torch_trainer.cache_data --help`."""

import sys
from typing import TYPE_CHECKING

from shared.prepare_data.cache.command import cache_by_command

if TYPE_CHECKING:
    from shared.config import TrainConfig
    from shared.prepare_data.cache.encoders import Encoders


def main(words: list[str]) -> int:
    """The exit code: see `cache_by_command`."""
    return cache_by_command(words, "torch", _open_encoders)


def _open_encoders(config: "TrainConfig") -> "Encoders":
    from torch_trainer.image_encoding import open_encoders  # here, so that mistakes need not wait for PyTorch

    return open_encoders(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
