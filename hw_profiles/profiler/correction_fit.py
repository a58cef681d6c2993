"""Fitting the correction of a latency table on whole networks.

Letters: N networks, C columns (terms of the fit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table.correction import MIB, Correction, Spill, traits, working_set_bytes
from hw_profiles.workload import Workload
from searchspace.specs import SubBlockSpec

Floats = NDArray[np.float64]

WORTHWHILE = 0.93
"""Each further term must lower the error of left-out networks by this factor to be taken."""
RIDGE_WORTHWHILE = 0.95
"""As must a ridge that of the best form without one."""
MIN_NETWORKS_PER_TERM = 4
NETWORKS_PER_COLUMN = 2
"""A ridge needs so many networks for each of its columns: below that, errors of left-out networks
say little."""
MIN_SHARE_OF_SUM = 0.5
"""Every network keeps at least this share of its plain sum."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the ridge, relative to the mean square of a column."""
COVERED = 0.9

SUM, COUNT, ONE, SPILLED = "sum", "count", "one", "spilled"
FORMS = ((SUM,), (SUM, COUNT), (SUM, ONE), (SUM, COUNT, ONE))
"""Terms that are tried together, each also with a price of working sets beyond a cache."""
CACHES_MIB = ((0.5, 1.5), (1.0, 3.0), (2.0, 4.0), (3.0, 6.0), (6.0, 12.0), (16.0, 48.0))
"""Sizes between which a working set outgrows a cache, that are tried; a size that no network
exceeds, or all do, is left out."""


@dataclass(frozen=True)
class Networks:
    """Whole networks that were timed.

    Args:
        specs: the sub-blocks of each, the ends included.
        entries_us: their entries, in the same order.
        measured_us: latency of each.
        workload: what was timed.
    """

    specs: Sequence[Sequence[SubBlockSpec]]
    entries_us: Sequence[Sequence[float]]
    measured_us: Sequence[float]
    workload: Workload

    def columns(self) -> dict[str, Floats]:
        """Return the terms that add up over sub-blocks, each of shape (N,)."""
        sums = [math.fsum(entries) for entries in self.entries_us]
        return {
            SUM: np.array(sums),
            COUNT: np.array([float(len(specs)) for specs in self.specs]),
            ONE: np.ones(len(sums)),
        }

    def working_set_mib(self) -> Floats:
        """Return what each reads in a pass, shape (N,)."""
        totals = [sum(working_set_bytes(s, self.workload) for s in row) for row in self.specs]
        return np.array(totals, dtype=np.float64) / MIB

    def trait_columns(self) -> dict[str, Floats]:
        """Return the sum of the entries that have a trait, for each trait that not all have."""
        found: dict[str, Floats] = {}
        for row, (specs, entries) in enumerate(zip(self.specs, self.entries_us, strict=True)):
            for spec, entry_us in zip(specs, entries, strict=True):
                for trait in traits(spec):
                    column = found.setdefault(trait, np.zeros(len(self.specs)))
                    column[row] += entry_us
        return {trait: column for trait, column in sorted(found.items()) if (column > 0).sum() > 1}


@dataclass(frozen=True)
class _Fit:
    """One fitted form: its terms and how well left-out networks are predicted."""

    correction: Correction
    score: float


def fit_correction(networks: Networks) -> Correction:
    """Fit the terms of a `Correction` by relative least squares.

    Of `FORMS` and, where there are enough networks, ridges on many more terms, the one is taken
    whose networks, left out of the fit one by one, are predicted best. Absolute errors would only
    follow the large networks.
    """
    target = np.asarray(networks.measured_us, dtype=np.float64)
    columns = networks.columns()
    plain = Correction(
        mape=float(np.abs(columns[SUM] / target - 1).mean() * 100), num_networks=len(target)
    )
    affine = _affine_fits(networks, columns, target)
    best = min(affine, key=lambda fit: fit.score, default=_Fit(plain, math.inf)).correction
    ridges = _ridges(networks, columns, target)
    ridge = min(ridges, key=lambda fit: fit.score, default=_Fit(plain, math.inf))
    return ridge.correction if ridge.score < RIDGE_WORTHWHILE * best.mape else best


def _affine_fits(networks: Networks, columns: dict[str, Floats], target: Floats) -> list[_Fit]:
    fits = []
    working_set_mib = networks.working_set_mib()
    smallest = min(min(entries) for entries in networks.entries_us)
    for form in FORMS:
        for cache in (None, *CACHES_MIB):
            terms = [columns[name] for name in form]
            spills: tuple[Spill, ...] = ()
            if cache is not None:
                spilled = Spill(*cache, 1.0, 0.0).share(working_set_mib)
                if not 2 <= int((spilled > 0).sum()) <= len(target) - 2:
                    continue
                terms.append(spilled * working_set_mib)
            if len(target) < MIN_NETWORKS_PER_TERM * len(terms):
                continue
            matrix = np.stack(terms, axis=1)
            weights, left_out = _left_out(matrix, target, np.zeros(len(terms)))
            values = dict(zip((*form, SPILLED), weights.tolist(), strict=False))
            if cache is not None:
                spills = (Spill(*cache, values[SPILLED], 0.0),)
            fair = (matrix @ weights >= MIN_SHARE_OF_SUM * columns[SUM]).all()
            scale, count_us = values[SUM], values.get(COUNT, 0.0)
            sound = scale > 0 and scale * smallest + count_us > 0
            if not (fair and sound) or (cache is not None and values[SPILLED] < 0):
                continue
            correction = Correction(
                scale=scale,
                per_sub_block_us=count_us,
                intercept_us=values.get(ONE, 0.0),
                spills=spills,
            )
            fits.append(_scored(correction, left_out, target, len(terms)))
    return fits


def _ridges(networks: Networks, columns: dict[str, Floats], target: Floats) -> list[_Fit]:
    """Return fits that price traits and several caches, shrunk towards an affine one."""
    mib = networks.working_set_mib()
    by_trait = networks.trait_columns()
    caches = [
        Spill(*cache, 0.0, 0.0)
        for cache in CACHES_MIB
        if int((mib > cache[0]).sum()) >= 2 and mib.min() < cache[1]
    ]
    free = [columns[SUM], columns[ONE], columns[COUNT]]
    spilled = [cache.share(mib) for cache in caches]
    present = {
        trait: has
        for trait, column in by_trait.items()
        if not (has := (column > 0).astype(np.float64)).all()
    }
    shrunk = [*by_trait.values(), *present.values()]
    shrunk += [*(s * mib for s in spilled), *(s * columns[SUM] for s in spilled)]
    if len(target) < NETWORKS_PER_COLUMN * (len(free) + len(shrunk)):
        return []
    matrix = np.stack([*free, *shrunk], axis=1)
    fits = []
    for penalty in PENALTIES:
        penalties = np.array([0.0] * len(free) + [penalty] * len(shrunk))
        weights, left_out = _left_out(matrix, target, penalties)
        if not (matrix @ weights >= MIN_SHARE_OF_SUM * columns[SUM]).all() or weights[0] <= 0:
            continue
        lengths = np.cumsum([len(by_trait), len(present), len(caches)])
        scales, once_us, prices, factors = np.split(weights[len(free) :], lengths)
        correction = Correction(
            scale=float(weights[0]),
            intercept_us=float(weights[1]),
            per_sub_block_us=float(weights[2]),
            scales=dict(zip(by_trait, scales.tolist(), strict=True)),
            once_us=dict(zip(present, once_us.tolist(), strict=True)),
            spills=tuple(
                Spill(cache.begin_mib, cache.end_mib, float(price), float(factor))
                for cache, price, factor in zip(caches, prices, factors, strict=True)
            ),
        )
        fits.append(_scored(correction, left_out, target, 0))
    return fits


def _left_out(columns_NC: Floats, target: Floats, penalties_C: Floats) -> tuple[Floats, Floats]:
    """Minimise the squared relative error plus a ridge penalty.

    Returns:
        The weights (C,), and for each network its prediction by a fit without it (N,), from the
        diagonal of the hat matrix.

    Source: Allen, "The relationship between variable selection and data augmentation and a method
    for prediction" (1974): the PRESS residuals.
    """
    relative = columns_NC / target[:, None]
    norms = np.sqrt((relative**2).mean(axis=0))
    norms[norms == 0] = 1.0
    relative = relative / norms
    gram = relative.T @ relative + np.diag((penalties_C + 1e-12) * len(target))
    hat = np.linalg.solve(gram, relative.T)
    weights = hat.sum(axis=1)
    leverage = np.minimum((relative * hat.T).sum(axis=1), 1 - 1e-6)
    residuals = (1 - relative @ weights) / (1 - leverage)
    return weights / norms, target * (1 - residuals)


def _scored(correction: Correction, left_out: Floats, target: Floats, num_terms: int) -> _Fit:
    """Add the error figures of networks predicted from the others.

    `error_90` is the conformal quantile of the factor between prediction and measurement.

    Source: Vovk et al., "Algorithmic Learning in a Random World" (2005), section 4.2.
    """
    num = len(target)
    if (left_out <= 0).any():
        return _Fit(correction, math.inf)
    factors = np.sort(np.exp(np.abs(np.log(left_out / target))) - 1)
    rank = min(math.ceil((num + 1) * COVERED), num)
    mape = float(np.abs(left_out / target - 1).mean() * 100)
    correction = replace(correction, mape=mape, error_90=float(factors[rank - 1]), num_networks=num)
    return _Fit(correction, mape * WORTHWHILE**-num_terms)
