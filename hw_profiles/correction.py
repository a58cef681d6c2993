"""Fitting the affine correction of a latency table on whole networks.

Letters: N networks, P terms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hw_profiles.latency_table import Correction

Floats = NDArray[np.float64]

# A further term must lower the error of left-out networks by this share to be taken.
WORTHWHILE = 0.9
MIN_NETWORKS_PER_TERM = 4


def fit_correction(
    sums_us: ArrayLike, counts: ArrayLike, measured_us: ArrayLike, smallest_entry_us: float
) -> Correction:
    """Fit `intercept + scale * sum + per_sub_block * count` by relative least squares.

    Tries scale only, scale and per-sub-block constant, and all three, and takes a richer form only
    where networks left out of the fit say so.

    Args:
        sums_us: sum of the table's entries of each network, shape (N,).
        counts: number of sub-blocks of each, the ends included, shape (N,).
        measured_us: latency of each, shape (N,).
        smallest_entry_us: a form that prices this entry at or below 0 is not taken.
    """
    target = np.asarray(measured_us, dtype=np.float64)
    columns = np.stack(
        [np.asarray(sums_us, float), np.asarray(counts, float), np.ones(len(target))], axis=1
    )
    best = Correction(num_networks=len(target), mape=_mape(columns[:, 0], target))
    for terms in (1, 2, 3):
        if len(target) < MIN_NETWORKS_PER_TERM * terms:
            break
        weights = _relative_least_squares(columns[:, :terms], target)
        scale, constant, intercept = (*weights, 0.0, 0.0)[:3]
        if scale <= 0 or scale * smallest_entry_us + constant <= 0 or intercept < 0:
            continue
        error = left_out_error(columns[:, :terms], target)
        if terms == 1 or error < WORTHWHILE * best.mape:
            best = Correction(scale, constant, intercept, error, len(target))
    return best


def left_out_error(columns_NP: Floats, target: Floats) -> float:
    """Return the mean absolute percentage error of each network predicted from the others."""
    predictions = np.empty_like(target)
    for row in range(len(target)):
        rest = np.arange(len(target)) != row
        weights = _relative_least_squares(columns_NP[rest], target[rest])
        predictions[row] = columns_NP[row] @ np.array(weights)
    return _mape(predictions, target)


def _relative_least_squares(columns_NP: Floats, target: Floats) -> list[float]:
    """Minimise the squared relative error; a first plain fit of absolute error would follow only
    the largest networks."""
    scaled = columns_NP / target[:, None]
    weights, *_ = np.linalg.lstsq(scaled, np.ones(len(target)), rcond=None)
    return [float(weight) for weight in weights]


def _mape(predicted: Floats, measured: Floats) -> float:
    return float(np.mean(np.abs(predicted / measured - 1.0)) * 100)
