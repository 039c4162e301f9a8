"""Does a generated picture follow its condition? The measure that `--evaluation_fidelity` names."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.sources.base import SubsetSource
from shared.data.sources.circles import draw
from shared.evaluation import circles, edges
from shared.evaluation.denoising import ValidationSample
from shared.evaluation.image_grid import in_colours
from shared.user_errors import UserError

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Fidelity:
    """How one picture for every held-out sample is measured.

    Attributes:
        main: the figure, 0 to 1, higher is better, in which a sudden convergence shows.
        measure: pictures uint8 [H,W,3] in the order of the samples → named figures, `main` among them.
    """

    main: str
    measure: Callable[[Sequence[Picture]], dict[str, float]]


def check_fidelity(config: TrainConfig) -> None:
    """Raises UserError where the measure that the configuration asks for needs a package that is not installed."""
    if config.evaluation_fidelity == "edges" and importlib.util.find_spec("cv2") is None:
        raise UserError(
            "--evaluation_fidelity edges needs OpenCV, which is not installed. Run: pip install opencv-python-headless"
        )


def open_fidelity(config: TrainConfig, held_out: SubsetSource, samples: Sequence[ValidationSample]) -> Fidelity | None:
    """The measure that the configuration asks for, None where it asks for none."""
    if config.evaluation_fidelity == "circles":
        indices = [int(held_out.indices[sample.index]) for sample in samples]
        truths = [draw(index, config.resolution, config.seed).truth for index in indices]
        return Fidelity(
            "circle_iou",
            lambda pictures: circles.summarise(
                [circles.measure(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
            ),
        )
    if config.evaluation_fidelity == "edges":
        conditions = [in_colours(sample.conditioning_pixels) for sample in samples]
        return Fidelity(
            "edge_f1",
            lambda pictures: edges.summarise(
                [edges.measure(condition, [picture]) for condition, picture in zip(conditions, pictures, strict=True)]
            ),
        )
    return None
