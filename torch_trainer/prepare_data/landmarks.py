"""`--condition landmarks`: faces' 68 points, drawn as for the FaceSynthetics ControlNet of Hugging Face's guide.

That guide ("Train your ControlNet with diffusers") finds the points with SPIGA. dlib finds the same ones (those of
300-W: Sagonas et al. 2013), and installs on a current Python.

Axes: H height, W width, C = 3 channels.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw

from shared.data.sample import BadSampleError
from shared.prepare_data.annotating import Annotator
from shared.prepare_data.conditions import Pixels
from shared.untrusted import foreign_library, shown
from shared.user_errors import UserError

Point = tuple[float, float]

POINTS = 68

_LINE = 4 / 512  # width by the image's shorter side


class _Part(NamedTuple):
    """Points of one part of a face, from `first` up to `end`, and whether they enclose something."""

    first: int
    end: int
    colour: str
    is_closed: bool = False


_PARTS = (
    _Part(0, 17, "lime"),  # jaw
    _Part(17, 22, "yellow"),  # eyebrows
    _Part(22, 27, "yellow"),
    _Part(27, 31, "orange"),  # nose: its bridge, its wings
    _Part(31, 36, "orange"),
    _Part(36, 42, "magenta", is_closed=True),  # eyes
    _Part(42, 48, "magenta", is_closed=True),
    _Part(48, 60, "cyan", is_closed=True),  # lips, outer and inner
    _Part(60, 68, "blue", is_closed=True),
)


def open_landmarks(name: str) -> Annotator:
    """Faces drawn on black, uint8 [H,W,C]. An image without any is a bad sample.

    Args:
        name: the file of a shape predictor of dlib's, of 68 points.

    Raises:
        UserError: it cannot be read, or is another.
    """
    if not Path(name).is_file():
        raise UserError(f"--annotator_model {shown(name)} is no file: name dlib's, of 68 points (from dlib.net).")
    with foreign_library(f"{shown(name)} cannot be read by dlib", "Download it again, and unpack its bzip2."):
        import dlib

        find_faces, find_points = dlib.get_frontal_face_detector(), dlib.shape_predictor(name)
    lock = threading.Lock()  # dlib's detector keeps what it works on

    def prepare(image_HWC: Pixels) -> Pixels:
        image_HWC = np.ascontiguousarray(image_HWC)
        with lock:
            found = [find_points(image_HWC, face) for face in find_faces(image_HWC, 1)]
        if not found:
            raise BadSampleError("no face was found in its image")
        return draw_faces(image_HWC.shape[0], image_HWC.shape[1], [_points_of(shape, name) for shape in found])

    def annotate(drawn: Sequence[Pixels]) -> Sequence[Pixels]:
        return drawn

    return Annotator(prepare, annotate)


def draw_faces(height: int, width: int, faces: Sequence[Sequence[Point]]) -> Pixels:
    """uint8 [H,W,C]: of each face 68 points (x, y), as lines; eyes and lips are filled."""
    picture = PIL.Image.new("RGB", (width, height))
    draw, line = PIL.ImageDraw.Draw(picture), max(1, round(_LINE * min(height, width)))
    for points in faces:
        for part in _PARTS:
            contour = list(points[part.first : part.end])
            if part.is_closed:
                draw.polygon(contour, fill=part.colour)
                contour.append(contour[0])
            draw.line(contour, fill=part.colour, width=line, joint="curve")
    return np.asarray(picture)


def _points_of(shape: Any, name: str) -> list[Point]:
    if shape.num_parts != POINTS:
        raise UserError(f"{shown(name)} finds {shape.num_parts} points in a face: expected dlib's file of {POINTS}.")
    return [(float(point.x), float(point.y)) for point in shape.parts()]
