"""SSIM of edge maps, against scikit-image."""

import numpy as np
import pytest
import skimage.data
from skimage.metrics import structural_similarity

from shared.evaluate.metrics.edges import ssim
from shared.evaluation.edges import canny


@pytest.mark.parametrize("shift", [0, 1, 30])
def test_ssim_is_that_of_scikit_image(shift: int) -> None:
    photograph = skimage.data.astronaut()[:96, 150:270]
    edges_HW = np.where(canny(photograph), 255.0, 0.0)
    shifted_HW = np.roll(edges_HW, shift, axis=1)
    _, expected_HW = structural_similarity(
        edges_HW, shifted_HW, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim(edges_HW, shifted_HW) == pytest.approx(expected_HW.mean(), abs=1e-9)
    assert (shift == 0) == (ssim(edges_HW, shifted_HW) > 0.999)
