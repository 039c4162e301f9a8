"""Measure a ControlNet on held-out data in PyTorch: `python3 -m torch_trainer.evaluate --help` lists every flag."""

import sys
from typing import TYPE_CHECKING

from shared.evaluate.command import evaluate_by_command

if TYPE_CHECKING:
    from shared.generate.pictures import Artist
    from shared.generate.preparation import Commission


def main(words: list[str]) -> int:
    """The exit code: see `evaluate_by_command`."""
    return evaluate_by_command(words, "torch", _make_artist)


def _make_artist(commission: "Commission") -> "Artist":
    from torch_trainer.evaluation.artist import make_artist  # here, so that mistakes need not wait for PyTorch

    return make_artist(commission)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
