"""`CalibratedPrior`: the roofline, corrected by what has been measured so far.

Letters: N entries, P terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.roofline.operator_work import work
from hw_profiles.roofline.prior import Roofline
from hw_profiles.workload import Workload
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec

Floats = NDArray[np.float64]
Entries = Mapping[tuple[str, str], float]
"""Measured latencies in microseconds by (workload name, sub-block key)."""

SHRINKAGE = 1.0
"""Weight of a term at 0, in entries: a kind measured once keeps half of what it deviates."""
ITERATIONS = 12
HUBER = 1.345
"""Deviations, in standard deviations, from which on an entry's pull no longer grows."""
LEAST_DEVIATION = 0.02
REFERENCE_WIDTH = 128


@dataclass(frozen=True)
class CalibratedPrior:
    """Predicts latencies that were not measured from those that were.

    Args:
        roofline: what is corrected.
        terms: logarithms of factors, by the name of what they are a factor of; without any, the
            roofline is the prediction.
        specs: the sub-blocks that were given to `fit`, by key.
    """

    roofline: Roofline
    terms: Mapping[str, float]
    specs: Mapping[str, SubBlockSpec]

    @classmethod
    def fit(
        cls, entries: Entries, specs: Iterable[SubBlockSpec], roofline: Roofline
    ) -> CalibratedPrior:
        """Explain the logarithm of measured / roofline by what the sub-blocks are.

        Ridge regression, which leaves what was never measured at the roofline's value, with
        residuals weighted so that disturbed entries pull little.

        Args:
            entries: what was measured; entries of other sub-blocks than `specs` are left out.
            specs: the sub-blocks of the search space.
            roofline: of the entries' device.

        Source: Hoerl and Kennard 1970, "Ridge Regression"; Huber 1964, "Robust Estimation of a
        Location Parameter".
        """
        by_key = {spec.key: spec for spec in specs}
        design = _design(entries, by_key, roofline)
        if not design.found:
            return cls(roofline, {}, by_key)
        terms_P = _robust_ridge(design.matrix_NP, design.target_N)
        return cls(roofline, dict(zip(design.names, terms_P.tolist(), strict=True)), by_key)

    def predict_us(self, specs: Sequence[SubBlockSpec], workload: Workload) -> Floats:
        """Return the predicted latency of each sub-block in microseconds, shape (N,)."""
        features = [_features(spec, workload, self.roofline) for spec in specs]
        terms_P = np.array(list(self.terms.values()))
        prior_us = [self.roofline.prior_us(work(spec, workload)) for spec in specs]
        return np.array(prior_us) * np.exp(_matrix(features, list(self.terms)) @ terms_P)


def left_out_errors(
    entries: Entries, specs: Iterable[SubBlockSpec], roofline: Roofline
) -> dict[tuple[str, str], float]:
    """Return predicted / measured of every entry, each mixer and FFN predicted from all others.

    What a prior is worth for an operator of which nothing has been measured.
    """
    by_key = {spec.key: spec for spec in specs}
    design = _design(entries, by_key, roofline)
    kind_N = np.array([kind_of(by_key[key]) for _, key in design.found])
    ratio_N = np.ones(len(kind_N))
    for kind in np.unique(kind_N):
        own_N = kind_N == kind
        terms_P = _robust_ridge(design.matrix_NP[~own_N], design.target_N[~own_N])
        ratio_N[own_N] = np.exp(design.matrix_NP[own_N] @ terms_P - design.target_N[own_N])
    return dict(zip(design.found, ratio_N.tolist(), strict=True))


@dataclass(frozen=True)
class _Design:
    """Entries as rows: which they are, their features (N, P), and log measured / roofline."""

    found: list[tuple[str, str]]
    names: list[str]
    matrix_NP: Floats
    target_N: Floats


def _design(entries: Entries, by_key: Mapping[str, SubBlockSpec], roofline: Roofline) -> _Design:
    found = [name for name in entries if name[1] in by_key]
    pairs = [(by_key[key], Workload.parse(workload)) for workload, key in found]
    features = [_features(spec, workload, roofline) for spec, workload in pairs]
    names = sorted({name for row in features for name in row})
    prior_us = [roofline.prior_us(work(spec, workload)) for spec, workload in pairs]
    target_N = np.log(np.array([entries[name] for name in found]) / np.array(prior_us))
    return _Design(found, names, _matrix(features, names), target_N)


def kind_of(spec: SubBlockSpec) -> str:
    """Return the name of a sub-block's mixer or FFN; ``"ends"`` for the ends."""
    if isinstance(spec, MixerSpec):
        return spec.mixer
    return spec.ffn if isinstance(spec, FFNSpec) else "ends"


def precision_of(spec: SubBlockSpec) -> str:
    """Return the precision of a sub-block's linear maps."""
    return "fp32" if isinstance(spec, EndsSpec) else spec.precision


def _features(spec: SubBlockSpec, workload: Workload, roofline: Roofline) -> dict[str, float]:
    """Return what a deviation from the roofline may come from, each also by itself in its phase.

    Names are 1 where they hold; the width counts in doublings.
    """
    own = [kind_of(spec), f"precision {precision_of(spec)}"]
    if not isinstance(spec, EndsSpec):
        own += [f"norm {spec.norm}"]
        own += [f"{kind_of(spec)} {name}={value}" for name, value in spec.options]
    features = dict.fromkeys(["all", *own], 1.0)
    features["width"] = math.log2(spec.d_model / REFERENCE_WIDTH)
    features["rates"] = roofline.rates_share(work(spec, workload))
    in_phase = {f"{name} in {workload.phase}": value for name, value in features.items()}
    return {**features, **in_phase, workload.name: 1.0}


def _matrix(features: Sequence[Mapping[str, float]], names: Sequence[str]) -> Floats:
    """Return the features as (N, P); names that are not asked for are left out."""
    column = {name: index for index, name in enumerate(names)}
    matrix_NP = np.zeros((len(features), len(names)))
    for row, named in enumerate(features):
        for name, value in named.items():
            if name in column:
                matrix_NP[row, column[name]] = value
    return matrix_NP


def _robust_ridge(matrix_NP: Floats, target_N: Floats) -> Floats:
    """Return the terms (P,) by iteratively reweighted least squares, shrunk to 0."""
    if not len(target_N):
        return np.zeros(matrix_NP.shape[1])
    penalty_PP = SHRINKAGE * np.eye(matrix_NP.shape[1])
    weight_N = np.ones(len(target_N))
    for _ in range(ITERATIONS):
        weighted_PN = (matrix_NP * weight_N[:, None]).T
        terms_P = np.linalg.solve(weighted_PN @ matrix_NP + penalty_PP, weighted_PN @ target_N)
        residual_N = np.abs(target_N - matrix_NP @ terms_P)
        limit = HUBER * (1.4826 * float(np.median(residual_N)) + LEAST_DEVIATION)
        weight_N = limit / np.maximum(residual_N, limit)
    return np.asarray(terms_P)
