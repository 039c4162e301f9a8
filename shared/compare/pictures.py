"""The pictures that both runs made, and how far they lie apart.

Axes: H height, W width, C = 3 channels.
"""

import io
import re
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

AMPLIFICATION = 8
"""By how much the picture of a difference is brighter than the difference."""

_PREVIEW_WIDTH = 720  # pixels


@dataclass(frozen=True)
class PictureDifference:
    """Absolute differences of the values, 0 to 255 each: their mean and the largest."""

    mean: float
    largest: int


@dataclass(frozen=True)
class PicturePair:
    """The same picture of both runs, None where a run has none."""

    name: str
    a: Path | None
    b: Path | None

    def difference_HWC(self) -> Pixels | None:
        """|a - b|, uint8 [H, W, 3]; None where one is missing or they differ in size."""
        if self.a is None or self.b is None:
            return None
        a_HWC, b_HWC = _read(self.a).astype(np.int16), _read(self.b).astype(np.int16)
        return np.abs(a_HWC - b_HWC).astype(np.uint8) if a_HWC.shape == b_HWC.shape else None


def measure(difference_HWC: Pixels) -> PictureDifference:
    """The figures of what `PicturePair.difference_HWC` gives."""
    return PictureDifference(float(difference_HWC.mean(dtype=np.float64)), int(difference_HWC.max()))


def amplified(difference_HWC: Pixels) -> Pixels:
    """`AMPLIFICATION` times as bright, clipped."""
    return np.minimum(difference_HWC.astype(np.uint16) * AMPLIFICATION, 255).astype(np.uint8)


def validation_steps(folder_a: Path, folder_b: Path) -> list[int]:
    """The steps at which either run made pictures, in order."""
    found = [
        re.fullmatch(r"step-(\d+)", path.name) for run in (folder_a, folder_b) for path in run.glob("validation/*")
    ]
    return sorted({int(match[1]) for match in found if match})


def validation_pairs(folder_a: Path, folder_b: Path, step: int) -> list[PicturePair]:
    """The pictures of a step, by name."""
    folders = [run / "validation" / f"step-{step}" for run in (folder_a, folder_b)]
    names = sorted({path.name for folder in folders for path in folder.glob("*.png")})
    return [PicturePair(name, *(_existing(folder / name) for folder in folders)) for name in names]


def contact_sheets(folder_a: Path, folder_b: Path) -> PicturePair | None:
    """The contact sheets, None if neither run has one."""
    pair = PicturePair("contact_sheet.png", *(_existing(run / "contact_sheet.png") for run in (folder_a, folder_b)))
    return pair if pair.a or pair.b else None


def inlined(path: Path) -> str:
    """The picture as it is, as a data URL."""
    return _data_url("png", path.read_bytes())


def inlined_preview(path: Path) -> str:
    """The picture as a data URL, compressed and at most 720 pixels wide: for the many that few people look at."""
    small = Image.fromarray(_read(path))
    small.thumbnail((_PREVIEW_WIDTH, 16 * _PREVIEW_WIDTH))
    return _encoded(small, "WEBP")


def inlined_pixels(pixels_HWC: Pixels) -> str:
    """uint8 [H, W, 3] as a data URL, without loss."""
    return _encoded(Image.fromarray(pixels_HWC), "PNG")


def _encoded(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind, quality=85, optimize=True)
    return _data_url(kind.lower(), file.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode('ascii')}"


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _read(path: Path) -> Pixels:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"The picture {path} cannot be read ({error}). Copy it again, or remove it.") from error
