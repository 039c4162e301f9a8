"""How far two sets of features lie apart, as normal distributions.

Reference: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium":
‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

Axes: N samples, D features.
"""

import numpy as np
import numpy.typing as npt


def frechet_distance(a_ND: npt.NDArray[np.floating], b_ND: npt.NDArray[np.floating]) -> float:
    """Of two sets of features, two or more in each: 0 for equal means and covariances.

    The covariances are those of samples (divided by N - 1). With Σ = RᵀR, the eigenvalues of Σ₁Σ₂ are the squared
    singular values of R₁R₂ᵀ, whose sum is the last trace: no root of a nearly singular matrix is taken.
    """
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a_ND), _mean_and_root(b_ND)
    of_roots = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * of_roots
    return float(max(distance, 0.0))


def _mean_and_root(x_ND: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The mean [D], and R [min(N, D), D] with RᵀR the covariance."""
    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    return mean_D, np.asarray(np.linalg.qr((x_ND - mean_D) / np.sqrt(len(x_ND) - 1), mode="r"))
