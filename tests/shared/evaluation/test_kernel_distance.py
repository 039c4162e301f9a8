"""The kernel distance against its definition, element by element, and its error against what it estimates."""

import itertools

import numpy as np
import pytest

from shared.evaluation.kernel_distance import kernel_distance

D = 6


def sets(seed: int, pairs: int, copies: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(pairs, D)).astype(np.float32), rng.normal(shift, 1, (pairs, copies, D)).astype(np.float32)


def defined(truths: np.ndarray, drawn: np.ndarray) -> float:
    """Bińkowski et al. 2018, equation 4."""
    x, y = truths.astype(float), drawn.reshape(-1, D).astype(float)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / D + 1) ** 3)

    of_x = sum(kernel(a, b) for a, b in itertools.permutations(x, 2)) / (len(x) * (len(x) - 1))
    of_y = sum(kernel(a, b) for a, b in itertools.permutations(y, 2)) / (len(y) * (len(y) - 1))
    return of_x + of_y - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("copies", [1, 3])
def test_it_is_what_is_defined_and_its_error_the_jackknife(copies: int) -> None:
    truths, drawn = sets(0, 7, copies, 0.3)
    found = kernel_distance(truths, drawn)
    assert found.value == pytest.approx(defined(truths, drawn), rel=1e-9)
    left = np.array([defined(np.delete(truths, pair, 0), np.delete(drawn, pair, 0)) for pair in range(7)])
    assert found.standard_error == pytest.approx(np.sqrt(6 / 7 * np.square(left - left.mean()).sum()), rel=1e-6)


def test_more_rows_than_are_looked_at_at_once() -> None:
    truths, drawn = sets(1, 700, 1)
    kernels = [
        (a @ b.T / D + 1) ** 3
        for a, b in itertools.product((truths.astype(float), drawn[:, 0].astype(float)), repeat=2)
    ]
    of_x, of_both, _, of_y = kernels
    expected = sum((k.sum() - np.trace(k)) / (700 * 699) for k in (of_x, of_y)) - 2 * of_both.mean()
    assert kernel_distance(truths, drawn).value == pytest.approx(expected, rel=1e-6)


def test_the_error_is_that_of_other_samples() -> None:
    """Of 200 pairs, over 100 draws of them: unbiased, and spread as the error says."""
    draws = [kernel_distance(*sets(seed, 200, 1, 0.4)) for seed in range(100)]
    values, errors = np.array(draws).T
    large = kernel_distance(*sets(1000, 4000, 1, 0.4))
    assert values.mean() == pytest.approx(large.value, abs=3 * np.hypot(large.standard_error, values.std() / 10))
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)
    same = np.array([kernel_distance(*sets(seed, 200, 1)).value for seed in range(100)])
    assert abs(same.mean()) < 3 * same.std() / 10
