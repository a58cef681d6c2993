"""Fitting the affine correction of a latency table on whole networks.

Letters: N networks, P terms.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hw_profiles.latency_table import Correction

Floats = NDArray[np.float64]

# Each further term must lower the error of left-out networks by this factor to be taken.
WORTHWHILE = 0.93
MIN_NETWORKS_PER_TERM = 4
# The smallest network keeps at least this share of its plain sum, whatever the intercept.
MIN_SHARE_OF_SUM = 0.5
MIB = 2**20

FORMS = (
    ("scale",),
    ("scale", "per_sub_block_us"),
    ("scale", "intercept_us"),
    ("scale", "per_sub_block_us", "intercept_us"),
    ("scale", "us_per_weight_mib", "intercept_us"),
)
"""Terms that are tried together. Weights matter where a network no longer fits into the caches that
each of its sub-blocks fits into alone."""


def fit_correction(
    sums_us: ArrayLike,
    counts: ArrayLike,
    weight_bytes: ArrayLike,
    measured_us: ArrayLike,
    smallest_entry_us: float,
) -> Correction:
    """Fit the terms of a `Correction` by relative least squares.

    Of `FORMS` the one is taken whose networks, left out of the fit one by one, are predicted best.

    Args:
        sums_us: sum of the table's entries of each network, shape (N,).
        counts: number of sub-blocks of each, the ends included, shape (N,).
        weight_bytes: of each, shape (N,).
        measured_us: latency of each, shape (N,).
        smallest_entry_us: a form that prices this entry at or below 0 is not taken.
    """
    target = np.asarray(measured_us, dtype=np.float64)
    columns = {
        "scale": np.asarray(sums_us, dtype=np.float64),
        "per_sub_block_us": np.asarray(counts, dtype=np.float64),
        "us_per_weight_mib": np.asarray(weight_bytes, dtype=np.float64) / MIB,
        "intercept_us": np.ones(len(target)),
    }
    best = Correction(num_networks=len(target), mape=_mape(columns["scale"], target))
    best_score = math.inf
    for form in FORMS:
        if len(target) < MIN_NETWORKS_PER_TERM * len(form):
            continue
        matrix = np.stack([columns[name] for name in form], axis=1)
        terms = dict(zip(form, _relative_least_squares(matrix, target), strict=True))
        fit = Correction(**terms, mape=left_out_error(matrix, target), num_networks=len(target))
        score = fit.mape * WORTHWHILE ** -len(form)
        if score < best_score and _plausible(fit, smallest_entry_us, columns["scale"].min()):
            best, best_score = fit, score
    return best


def _plausible(fit: Correction, smallest_entry_us: float, smallest_sum_us: float) -> bool:
    """Return whether no part of any network is priced at nothing or less."""
    return (
        fit.scale > 0
        and fit.us_per_weight_mib >= 0
        and fit.scale * smallest_entry_us + fit.per_sub_block_us > 0
        and fit.intercept_us >= -(1 - MIN_SHARE_OF_SUM) * smallest_sum_us
    )


def left_out_error(columns_NP: Floats, target: Floats) -> float:
    """Return the mean absolute percentage error of each network predicted from the others."""
    predictions = np.empty_like(target)
    for row in range(len(target)):
        rest = np.arange(len(target)) != row
        weights = _relative_least_squares(columns_NP[rest], target[rest])
        predictions[row] = columns_NP[row] @ np.array(weights)
    return _mape(predictions, target)


def _relative_least_squares(columns_NP: Floats, target: Floats) -> list[float]:
    """Minimise the squared relative error; absolute errors would only follow large networks."""
    scaled = columns_NP / target[:, None]
    weights, *_ = np.linalg.lstsq(scaled, np.ones(len(target)), rcond=None)
    return [float(weight) for weight in weights]


def _mape(predicted: Floats, measured: Floats) -> float:
    return float(np.mean(np.abs(predicted / measured - 1.0)) * 100)
