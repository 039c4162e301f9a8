"""Draw pictures with a ControlNet in PyTorch: `python3 -m torch_trainer.generate --help` lists every flag."""

import sys
from typing import TYPE_CHECKING

from shared.generate.command import generate_by_command

if TYPE_CHECKING:
    from shared.generate.pictures import Artist
    from shared.generate.preparation import Job


def main(words: list[str]) -> int:
    """The exit code: see `generate_by_command`."""
    return generate_by_command(words, "torch", _make_artist)


def _make_artist(job: "Job") -> "Artist":
    from torch_trainer.evaluation.artist import make_artist  # here, so that mistakes need not wait for PyTorch

    return make_artist(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
