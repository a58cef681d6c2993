"""Fitting the affine correction of a latency table on whole networks.

Letters: N networks, P terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hw_profiles.latency_table import Correction

Floats = NDArray[np.float64]

# Each further term must lower the error of left-out networks by this factor to be taken.
WORTHWHILE = 0.93
MIN_NETWORKS_PER_TERM = 4
# Every network keeps at least this share of its plain sum.
MIN_SHARE_OF_SUM = 0.5
MIB = 2**20

SPILL = "us_per_spilled_mib"
FORMS = (
    ("scale",),
    ("scale", "per_sub_block_us"),
    ("scale", "intercept_us"),
    ("scale", SPILL),
    ("scale", "per_sub_block_us", "intercept_us"),
    ("scale", "per_sub_block_us", SPILL),
    ("scale", SPILL, "intercept_us"),
)
"""Terms that are tried together."""
CACHES_MIB = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Cache sizes that are tried; a size that no network exceeds, or all do, is left out."""


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
    weight_mib = np.asarray(weight_bytes, dtype=np.float64) / MIB
    columns = {
        "scale": np.asarray(sums_us, dtype=np.float64),
        "per_sub_block_us": np.asarray(counts, dtype=np.float64),
        "intercept_us": np.ones(len(target)),
    }
    best = Correction(num_networks=len(target), mape=_mape(columns["scale"], target))
    best_score = math.inf
    for form, cache_mib in _candidates(weight_mib):
        if len(target) < MIN_NETWORKS_PER_TERM * len(form):
            continue
        columns[SPILL] = np.maximum(weight_mib - cache_mib, 0.0)
        matrix = np.stack([columns[name] for name in form], axis=1)
        weights = _relative_least_squares(matrix, target)
        terms = dict(zip(form, weights, strict=True))
        fit = Correction(
            **terms,
            cache_mib=cache_mib,
            mape=left_out_error(matrix, target),
            num_networks=len(target),
        )
        fair = bool((matrix @ np.array(weights) >= MIN_SHARE_OF_SUM * columns["scale"]).all())
        score = fit.mape * WORTHWHILE ** -len(form)
        if score < best_score and fair and _plausible(fit, smallest_entry_us):
            best, best_score = fit, score
    return best


def _candidates(weight_mib: Floats) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield every form, with every sensible cache size where the form has the term."""
    for form in FORMS:
        if SPILL not in form:
            yield form, 0.0
            continue
        for cache_mib in CACHES_MIB:
            if 2 <= int((weight_mib > cache_mib).sum()) <= len(weight_mib) - 2:
                yield form, cache_mib


def _plausible(fit: Correction, smallest_entry_us: float) -> bool:
    """Return whether no term prices a part of a network at nothing or less."""
    return (
        fit.scale > 0
        and fit.us_per_spilled_mib >= 0
        and fit.scale * smallest_entry_us + fit.per_sub_block_us > 0
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
