"""Are the condition's edges found again in the pictures? F1, precision, recall and SSIM of Canny edges.

F1 is that of `shared.evaluation.edges`. SSIM of edge maps is what Li et al. 2024 ("ControlNet++") measure soft edges
and line drawings with; in part it forgives an edge that lies a pixel aside, which F1 does not, and black that agrees
counts, so that unrelated maps are not at 0.

Axes: H height, W width.
"""

import importlib.util
from functools import partial

import numpy as np
import numpy.typing as npt

from shared.evaluate.metrics.base import MeanOverConditions, Measured, Metric
from shared.evaluation.edges import HIGH_THRESHOLD, LOW_THRESHOLD, canny, measure
from shared.evaluation.image_grid import in_colours
from shared.generate.models import NamedModels
from shared.user_errors import UserError

_WINDOW, _SIGMA = (11, 11), 1.5
_STABILISERS = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def open_edges(models: NamedModels) -> Metric:
    """Raises UserError where OpenCV is missing, or it is not one condition that is to be found again."""
    if importlib.util.find_spec("cv2") is None:
        raise UserError("--metrics edges needs OpenCV, which is not installed. Run: pip install opencv-python-headless")
    if len(models.conditions) > 1:
        raise UserError(
            f"--metrics edges compares pictures with one condition, and there are {len(models.conditions)}: leave it "
            "out."
        )
    return MeanOverConditions(
        _of_condition, "higher", {"extractor": f"OpenCV Canny, thresholds {LOW_THRESHOLD} and {HIGH_THRESHOLD}"}
    )


def _of_condition(measured: Measured) -> dict[str, float]:
    condition_HWC = in_colours(measured.condition_HWN)
    agreement = measure(condition_HWC, measured.pictures_HWC)
    asked_HW = np.where(condition_HWC.max(axis=-1) > 127, 255.0, 0.0)
    similarity = partial(ssim, asked_HW)
    return {
        "edge_f1": agreement.f1,
        "edge_precision": agreement.precision,
        "edge_recall": agreement.recall,
        "edge_ssim": float(
            np.mean([similarity(np.where(canny(picture), 255.0, 0.0)) for picture in measured.pictures_HWC])
        ),
    }


def ssim(a_HW: npt.NDArray[np.float64], b_HW: npt.NDArray[np.float64]) -> float:
    """Structural similarity of two grey pictures, 0 to 255: 1 for equal ones.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", with the paper's
    Gaussian window (11 pixels, standard deviation 1.5) and constants, mirrored beyond the border.
    """
    import cv2

    def local_mean(values_HW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(values_HW, _WINDOW, _SIGMA, borderType=cv2.BORDER_REFLECT), np.float64)

    mean_a, mean_b = local_mean(a_HW), local_mean(b_HW)
    variance_a, variance_b = local_mean(a_HW**2) - mean_a**2, local_mean(b_HW**2) - mean_b**2
    covariance = local_mean(a_HW * b_HW) - mean_a * mean_b
    of_means, of_variances = _STABILISERS
    similarity_HW = (
        (2 * mean_a * mean_b + of_means)
        * (2 * covariance + of_variances)
        / ((mean_a**2 + mean_b**2 + of_means) * (variance_a + variance_b + of_variances))
    )
    return float(similarity_HW.mean())
