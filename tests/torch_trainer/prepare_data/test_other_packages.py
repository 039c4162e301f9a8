"""Conditions by packages that are not installed here: a stand-in of each package's documented interface.

What they are given and what is made of their answers is tried, and not what they find in an image.
"""

import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch

from shared.data.preprocessing import decode
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource
from tests.shared.data.pictures import config, pairs, write_image_folder
from torch_trainer.prepare_data.command import main
from torch_trainer.prepare_data.landmarks import POINTS, draw_faces


class Detector:
    """As controlnet_aux's: draws the image's negative, of a size that 64 divides."""

    def __init__(self) -> None:
        self.device = "none"

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str) -> "Detector":
        torch.load(Path(pretrained_model_or_path, "weights.pth"))
        return cls()

    def to(self, device: torch.device) -> "Detector":
        self.device = device.type
        return self

    def __call__(
        self,
        input_image: npt.NDArray[np.uint8],
        detect_resolution: int = 512,
        image_resolution: int = 512,
        output_type: str = "pil",
    ) -> Any:
        assert self.device == "cpu"
        assert output_type == "pil"
        scale = image_resolution / min(input_image.shape[:2])
        height, width = (max(1, round(side * scale / 64)) * 64 for side in input_image.shape[:2])
        return PIL.Image.fromarray(255 - input_image).resize((width, height), PIL.Image.Resampling.BILINEAR)


@pytest.fixture
def controlnet_aux(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("controlnet_aux")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    module.OpenposeDetector = module.HEDdetector = Detector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)


class Rectangle(SimpleNamespace):
    """Where a face is."""


def _points(face: Rectangle) -> SimpleNamespace:
    """68 points on a circle in the rectangle."""
    angles = np.arange(POINTS) / POINTS * 2 * np.pi
    x, y = face.x + face.radius * np.cos(angles), face.y + face.radius * np.sin(angles)
    parts = [SimpleNamespace(x=int(one), y=int(other)) for one, other in zip(x, y, strict=True)]
    return SimpleNamespace(num_parts=len(parts), parts=lambda: parts)


@pytest.fixture
def dlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_faces(image_HWC: npt.NDArray[np.uint8], upsample: int) -> list[Rectangle]:
        assert image_HWC.flags.c_contiguous
        height, width = image_HWC.shape[:2]
        return [Rectangle(x=width / 2, y=height / 2, radius=height / 3)] if image_HWC.mean() > 10 else []

    def shape_predictor(path: str) -> Any:
        if Path(path).read_bytes() != b"points":
            raise RuntimeError("Error deserializing object")
        return lambda image_HWC, face: _points(face)

    module = ModuleType("dlib")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    module.get_frontal_face_detector = lambda: find_faces  # type: ignore[attr-defined]
    module.shape_predictor = shape_predictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dlib", module)


def annotate(output: Path, *words: object) -> int:
    return main(["annotate", "--output_dir", str(output), "--num_workers", "2", *map(str, words)])


def packed(output: Path) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """Images and conditions, uint8 [H,W,C]."""
    source = open_source(config(train_shards=(f"{output}/*.tar",)))
    assert isinstance(source, RandomAccessSource)
    found = []
    for number in range(len(source)):
        sample = source[number]
        assert sample.image is not None
        (condition,) = sample.conditions
        found.append((np.asarray(decode(sample.image)), np.asarray(decode(condition))))
    return found


@pytest.mark.usefixtures("controlnet_aux")
@pytest.mark.parametrize("condition", ["pose", "soft_edges"])
def test_drawings_are_of_their_images_size(tmp_path: Path, condition: str) -> None:
    data = write_image_folder(tmp_path / "data", pairs(4))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    words = ("--train_data_dir", data, "--condition", condition, "--annotator_model", tmp_path)
    assert annotate(tmp_path / "shards", *words) == 0
    for image_HWC, condition_HWC in packed(tmp_path / "shards"):
        assert condition_HWC.shape == image_HWC.shape
        assert abs(condition_HWC.mean() - (255 - image_HWC.astype(float)).mean()) < 5


class Code:
    """A pickle that does something where it is read as one."""

    def __reduce__(self) -> Any:
        return (pytest.exit, ("it ran",))


@pytest.mark.usefixtures("controlnet_aux")
def test_weights_that_are_code_do_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--generated_circles", 2, "--condition", "pose", "--annotator_model", tmp_path)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Code()))
    assert annotate(tmp_path / "shards", *words) == 2
    assert "holds something else than tensors, and reading that could run code" in capsys.readouterr().err
    (tmp_path / "weights.pth").write_bytes(b"")
    assert annotate(tmp_path / "shards", *words) == 2
    assert "cannot be loaded by controlnet_aux (EOFError" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


@pytest.mark.usefixtures("dlib")
def test_faces_are_drawn_and_images_without_one_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_image_folder(tmp_path / "data", pairs(3))
    PIL.Image.new("RGB", (32, 32)).save(data / "image" / "0001.png")
    model = tmp_path / "shape_predictor_68_face_landmarks.dat"
    model.write_bytes(b"points")
    words = ("--train_data_dir", data, "--condition", "landmarks", "--resolution", 64)
    assert annotate(tmp_path / "shards", *words) == 2
    assert "--annotator_model is missing: --condition landmarks has no usual one" in capsys.readouterr().err
    assert annotate(tmp_path / "shards", *words, "--annotator_model", data) == 2
    assert "is no file" in capsys.readouterr().err
    assert annotate(tmp_path / "shards", *words, "--annotator_model", data / "metadata.jsonl") == 2
    assert "cannot be read by dlib (RuntimeError: Error deserializing object)" in capsys.readouterr().err
    assert annotate(tmp_path / "shards", *words, "--annotator_model", model) == 0
    assert "no face was found in its image" in (tmp_path / "shards" / "packed.json").read_text()
    conditions = [condition_HWC for _, condition_HWC in packed(tmp_path / "shards")]
    assert len(conditions) == 2
    for condition_HWC in conditions:
        np.testing.assert_array_equal(condition_HWC, conditions[0])
        assert (condition_HWC == (0, 255, 0)).all(axis=-1).any()


def test_the_parts_of_a_face_have_their_colours() -> None:
    """A face of straight lines, its parts beside each other, as far as 68 points tell them."""
    points = [(10.0 + 6 * (number % 17), 10.0 + 20 * (number // 17)) for number in range(17)]  # jaw, at the top
    for first, end, x in ((17, 22, 10), (22, 27, 60), (27, 31, 110), (31, 36, 150)):
        points += [(x + 8.0 * number, 40.0) for number in range(end - first)]
    for sides, x in ((6, 20), (6, 60), (12, 110), (8, 160)):
        angles = np.arange(sides) / sides * 2 * np.pi
        points += [(x + 12 * float(np.cos(angle)), 80 + 12 * float(np.sin(angle))) for angle in angles]
    drawn_HWC = draw_faces(128, 200, [points])
    colours = {
        (10, 50): (0, 255, 0),
        (40, 20): (255, 255, 0),
        (40, 70): (255, 255, 0),
        (40, 120): (255, 165, 0),
        (40, 160): (255, 165, 0),
        (80, 20): (255, 0, 255),
        (80, 60): (255, 0, 255),
        (80, 110): (0, 255, 255),
        (80, 160): (0, 0, 255),
        (60, 100): (0, 0, 0),
        (40, 53): (0, 0, 0),
    }
    for place, colour in colours.items():
        assert tuple(drawn_HWC[place]) == colour, place


@pytest.mark.parametrize(
    ("condition", "package", "install"),
    [
        ("depth", "transformers", "pip install transformers"),
        ("segmentation", "transformers", "pip install transformers"),
        ("pose", "controlnet_aux", "pip install controlnet_aux torchvision"),
        ("soft_edges", "controlnet_aux", "pip install controlnet_aux torchvision"),
        ("landmarks", "dlib", "pip install dlib"),
    ],
)
def test_a_package_that_is_missing_is_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    condition: str,
    package: str,
    install: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    words = ("--generated_circles", 2, "--condition", condition, "--annotator_model", "x")
    assert annotate(tmp_path / "shards", *words) == 2
    said = f"--condition {condition} needs the package {package}, which is not installed. Run: {install}"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
