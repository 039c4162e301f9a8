"""One hostile input: where it lies, what is random about it, and the canaries that must not be seen again."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

PRIVATE_COLOUR = (201, 3, 77)
"""Of every pixel of the picture that lies outside of the data's folder."""

FORGED = "FORGED"
"""What every forged line begins with, after a line break or a control character of the input."""

_SPREAD = 0x9E3779B97F4A7C15  # of the seeds over a Philox's keys


@dataclass(frozen=True)
class Case:
    """A case has a folder of its own, in which everything happens.

    Attributes:
        number: decides, with the seed, everything about it.
        rng: what its builder draws from.
        secret: a token that nothing may show: it is in every file of `outside`, and may be given as a password.
    """

    seed: int
    number: int
    folder: Path
    rng: np.random.Generator
    secret: str

    @classmethod
    def of(cls, seed: int, number: int, folder: Path) -> "Case":
        """As its number decides; nothing is written."""
        rng = np.random.Generator(np.random.Philox(key=[seed, number * _SPREAD % 2**64]))
        return cls(seed, number, folder, rng, secret=f"hf_hostile{rng.integers(16**12):012x}")

    @property
    def inputs(self) -> Path:
        """What the command is told to read."""
        return self.folder / "inputs"

    @property
    def outside(self) -> Path:
        """What it must not read by itself: files of the user's own, beside the inputs."""
        return self.folder / "outside"

    @property
    def out(self) -> Path:
        """Where it writes, and its working directory."""
        return self.folder / "out"

    @property
    def executed(self) -> Path:
        """What code of the input would make, in the folder for temporary files, which Ghostscript may write to."""
        return self.folder / "tmp" / "executed"

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def below(self, limit: int) -> int:
        return int(self.rng.integers(limit))


def open_case(seed: int, number: int, folder: Path) -> Case:
    """A case with its folders and canaries, and nothing hostile in it yet."""
    case = Case.of(seed, number, folder)
    for path in (case.inputs, case.outside, case.out, case.executed.parent):
        path.mkdir(parents=True)
    _write_canaries(case)
    os.environ["TMPDIR"] = tempfile.tempdir = str(case.executed.parent)
    return case


def _write_canaries(case: Case) -> None:
    outside, secret = case.outside, case.secret
    (outside / "secret.txt").write_text(f"{secret}\n")
    (outside / "secret.json").write_text(f'{{"text": "{secret}", "prompt": "{secret}", "{secret}": "{secret}"}}\n')
    (outside / "secret.yaml").write_text(f"{secret}: {secret}\n")
    (outside / "secret.csv").write_text(f"image,conditioning_image,text\nprivate.png,private.png,{secret}\n")
    PIL.Image.new("RGB", (40, 40), PRIVATE_COLOUR).save(outside / "private.png")
