"""How far two sets of features lie apart, by a polynomial kernel.

Reference: Bińkowski et al. 2018, "Demystifying MMD GANs": the unbiased estimate of the squared maximum mean discrepancy
under k(x, y) = (x·y / D + 1)³. It may come out below 0.

Axes: N pairs, S pictures of each, M = N S, D features.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROWS = 512  # of a kernel's matrix at once
LEAST_PAIRS = 3


class KernelDistance(NamedTuple):
    """`value`, and the standard error that the jackknife over pairs gives."""

    value: float
    standard_error: float


def kernel_distance(truths_ND: npt.NDArray[np.floating], drawn_NSD: npt.NDArray[np.floating]) -> KernelDistance:
    """Of pairs' own pictures and those that were drawn for them, `LEAST_PAIRS` pairs or more.

    Over all of them. The usual mean over random subsets estimates the same, with noise; and the spread of subsets is
    not the error of their mean, since they overlap. Here a pair is left out at a time, with all its pictures: what the
    estimate then is follows from sums of rows of the kernels' matrices.
    """
    pairs, copies, features = drawn_NSD.shape
    x_ND = np.asarray(truths_ND, np.float64)
    y_MD = np.asarray(drawn_NSD.reshape(pairs * copies, features), np.float64)
    of_truths, of_drawn, of_both = _sums(x_ND, x_ND, pairs), _sums(y_MD, y_MD, pairs), _sums(x_ND, y_MD, pairs)

    def estimate(count: npt.ArrayLike, truths: npt.ArrayLike, drawn: npt.ArrayLike, both: npt.ArrayLike) -> Floats:
        n = np.asarray(count, np.float64)
        m = n * copies
        of_each = np.asarray(truths) / (n * (n - 1)), np.asarray(drawn) / (m * (m - 1)), np.asarray(both) / (n * m)
        return np.asarray(of_each[0] + of_each[1] - 2 * of_each[2])

    truths_own, drawn_own = _kernel_with_itself(x_ND), _kernel_with_itself(y_MD).reshape(pairs, copies)
    apart = of_truths.total - truths_own.sum(), of_drawn.total - drawn_own.sum(), of_both.total
    value = float(estimate(pairs, *apart))
    left_N = estimate(
        pairs - 1,
        of_truths.without_each() - (truths_own.sum() - truths_own),
        of_drawn.without_each() - (drawn_own.sum() - drawn_own.sum(axis=1)),
        of_both.without_each(),
    )
    spread = np.square(left_N - left_N.mean()).sum() * (pairs - 1) / pairs
    return KernelDistance(value, float(np.sqrt(spread)))


class _Sums(NamedTuple):
    """Of a kernel's matrix, by pair: its rows [N], its columns [N], and what lies in both [N]."""

    rows_N: Floats
    columns_N: Floats
    within_N: Floats

    @property
    def total(self) -> float:
        return float(self.rows_N.sum())

    def without_each(self) -> Floats:
        """The sum over the matrix without the rows and columns of one pair."""
        return self.total - self.rows_N - self.columns_N + self.within_N


def _sums(a_AD: Floats, b_BD: Floats, pairs: int) -> _Sums:
    """`a` and `b` have equally many rows for each pair, one pair's after the other's."""
    rows_A, columns_B, within_A = np.zeros(len(a_AD)), np.zeros(len(b_BD)), np.zeros(len(a_AD))
    pair_of_a, pair_of_b = (np.arange(len(x)) // (len(x) // pairs) for x in (a_AD, b_BD))
    for start in range(0, len(a_AD), _ROWS):
        part = slice(start, start + _ROWS)
        kernel_AB = (a_AD[part] @ b_BD.T / a_AD.shape[1] + 1) ** 3
        rows_A[part] = kernel_AB.sum(axis=1)
        columns_B += kernel_AB.sum(axis=0)
        within_A[part] = np.where(pair_of_a[part, None] == pair_of_b, kernel_AB, 0).sum(axis=1)
    return _Sums(*(values.reshape(pairs, -1).sum(axis=1) for values in (rows_A, columns_B, within_A)))


def _kernel_with_itself(x_ND: Floats) -> Floats:
    result: Floats = (np.square(x_ND).sum(axis=1) / x_ND.shape[1] + 1) ** 3
    return result
