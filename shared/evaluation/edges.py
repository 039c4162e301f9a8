"""Conditioning fidelity on Canny edges: are the condition's edges found again in the generated pictures?

Reference: Li et al. 2024, "ControlNet++: Improving Conditional Controls with Efficient Consistency Feedback", whose
measure for this condition is F1, edge or no edge, pixel by pixel and without tolerance. As in its repository's
eval/eval_edge.py, the pixels of all pictures that one condition gave are pooled, and F1 is averaged over conditions.
Its eval/eval.py holds two extractors: task `canny_cv2`, OpenCV's with thresholds 100 and 200, how Canny conditions are
commonly made and what is used here; and task `canny`, which its eval/eval_canny.sh runs, kornia's on a blurred picture
with thresholds 0.1 and 0.2. They find different edges: compare figures of one extractor only.

Axes: H height, W width, C = 3 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.user_errors import UserError

LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200
"""Of the Sobel gradient's L1 norm on 8-bit pixels."""


@dataclass(frozen=True)
class EdgeAgreement:
    """Pixels that are edges: `produced` of the pictures, `asked` of the condition, `true_positives` of both."""

    true_positives: int
    produced: int
    asked: int

    @property
    def precision(self) -> float:
        """Share of the produced edges that the condition has; 0 where none were produced, as torchmetrics has it."""
        return self.true_positives / self.produced if self.produced else 0.0

    @property
    def recall(self) -> float:
        """Share of the condition's edges that were produced; 0 for a condition without edges."""
        return self.true_positives / self.asked if self.asked else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 without any edges."""
        total = self.produced + self.asked
        return 2 * self.true_positives / total if total else 0.0


def canny(image_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """The edges (bool [H,W]) of an RGB picture, by OpenCV's Canny detector (Canny 1986) without blurring first.

    Raises:
        UserError: the picture is not uint8 [H, W, 3], or OpenCV is not installed.
    """
    _check(image_HWC)
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "Canny edges are measured with OpenCV, which is not installed. Run: pip install opencv-python-headless"
        ) from error
    return cv2.Canny(np.ascontiguousarray(image_HWC), LOW_THRESHOLD, HIGH_THRESHOLD) > 0


def measure(
    conditioning_image_HWC: npt.NDArray[np.uint8], images_HWC: Sequence[npt.NDArray[np.uint8]]
) -> EdgeAgreement:
    """Compare the edges of the pictures that one condition gave with that condition: white (above 127) on black.

    Raises:
        UserError: no pictures, or not all uint8 [H, W, 3] of the condition's size; OpenCV is not installed.
    """
    _check(conditioning_image_HWC)
    if not images_HWC:
        raise UserError("No pictures to compare with the condition; give at least one generated picture.")
    asked_HW = conditioning_image_HWC.max(axis=-1) > 127
    counts = np.zeros(3, np.int64)
    for image_HWC in images_HWC:
        produced_HW = canny(image_HWC)
        if produced_HW.shape != asked_HW.shape:
            raise UserError(
                f"A picture has shape {image_HWC.shape}; expected its condition's, {conditioning_image_HWC.shape}. "
                "Generate it at that size."
            )
        counts += [np.count_nonzero(mask) for mask in (produced_HW & asked_HW, produced_HW, asked_HW)]
    return EdgeAgreement(*map(int, counts))


def summarise(measured: Sequence[EdgeAgreement]) -> dict[str, float]:
    """Means over conditions: `edge_precision`, `edge_recall`, `edge_f1`.

    Raises:
        UserError: nothing was measured.
    """
    if not measured:
        raise UserError("No conditions were measured; give at least one.")
    return {
        "edge_precision": float(np.mean([agreement.precision for agreement in measured])),
        "edge_recall": float(np.mean([agreement.recall for agreement in measured])),
        "edge_f1": float(np.mean([agreement.f1 for agreement in measured])),
    }


def _check(image_HWC: npt.NDArray[np.uint8]) -> None:
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise UserError(f"The picture is {image_HWC.dtype} {image_HWC.shape}; expected uint8 [H, W, 3].")
