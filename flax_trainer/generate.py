"""Draw pictures with a ControlNet in JAX: `python3 -m flax_trainer.generate --help` lists every flag."""

import sys
from typing import TYPE_CHECKING

from shared.generate.command import generate_by_command

if TYPE_CHECKING:
    from shared.generate.pictures import Artist
    from shared.generate.preparation import Job


def main(words: list[str]) -> int:
    """The exit code: see `generate_by_command`."""
    return generate_by_command(words, "flax", _make_artist)


def _make_artist(job: "Job") -> "Artist":
    from flax_trainer.evaluation.artist import make_artist  # here, so that mistakes need not wait for JAX

    return make_artist(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
