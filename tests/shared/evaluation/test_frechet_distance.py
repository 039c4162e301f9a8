"""The Fréchet distance against the formula as it is written, with scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from shared.evaluation.frechet_distance import frechet_distance


def features(seed: int, count: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated ones, [count, 24]."""
    mixing = np.random.default_rng(0).normal(size=(24, 24))
    return (np.random.default_rng(seed).normal(size=(count, 24)) @ mixing * scale + shift).astype(np.float32)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.0), (1.0, 2.0)])
def test_it_is_the_published_formula(scale: float, shift: float) -> None:
    a, b = features(1, 300), features(2, 200, scale, shift)
    of_a, of_b = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(of_a @ of_b).real
    expected = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(of_a + of_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_fewer_samples_than_features() -> None:
    """Singular covariances, whose roots are exact all the same: of three points on a line and their double."""
    line = np.outer([-1.0, 0.0, 1.0], np.eye(24)[0])
    assert frechet_distance(line, 2 * line) == pytest.approx(1.0)  # standard deviations 1 and 2
    assert frechet_distance(line, line) == pytest.approx(0, abs=1e-9)


def test_equal_sets_in_any_order_are_at_no_distance() -> None:
    a = features(1, 300)
    assert frechet_distance(a, np.random.default_rng(3).permutation(a)) < 1e-6 * frechet_distance(a, 2 * a)
