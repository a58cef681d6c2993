"""Columns that latency depends on simply: sizes, their logarithms and their products.

Letters: N training rows, M rows, P features, Q columns, S other devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.models.base import FloatArray, State

IndexArray = NDArray[np.int64]

_MAX_FACTORS = 16


@dataclass(frozen=True)
class LatencyDesign:
    """The columns of a design matrix, standardised on the training rows.

    Features that never vary are dropped; one that is missing (NaN) takes its mean and, where
    some training row misses it, gets a column that says so. Layers, widths and heads act through
    their products, hence the products of all pairs (of the features that go most with the
    target, if there are many). Where a feature is not positive, its logarithm is itself.

    Args:
        fill: what a missing value is replaced by, shape (P,).
        floor, source_floor: the least value that a logarithm is taken of, NaN where none is
            taken because some training row is not positive; shapes (P,) and (S,).
        kept, gaps, factors: features that vary, that may be missing, that are multiplied.
        centre, spread: of the columns, shape (Q,).
    """

    fill: FloatArray
    floor: FloatArray
    source_floor: FloatArray
    kept: IndexArray
    gaps: IndexArray
    factors: IndexArray
    centre: FloatArray
    spread: FloatArray

    @classmethod
    def of(cls, X: FloatArray, y: FloatArray, sources: FloatArray) -> LatencyDesign:
        """Choose the columns for features (N, P), targets (N,), other devices' values (N, S)."""
        missing = np.isnan(X)
        fill = np.nanmean(np.where(missing.all(axis=0), 0.0, X), axis=0)
        filled = np.where(missing, fill, X)
        varied = np.ptp(filled, axis=0) > 1e-12 * np.abs(filled).max(axis=0)
        kept = np.flatnonzero(varied)
        gaps = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
        factors = _factors(filled, y, kept)
        none, one = np.zeros(1), np.ones(1)
        floors = _floor(filled), _floor(sources)
        plain = cls(fill, *floors, kept, gaps, factors, none, one)
        columns = plain.transform(X, sources)
        spread = columns.std(axis=0)
        return replace(plain, centre=columns.mean(axis=0), spread=np.where(spread > 0, spread, 1.0))

    def transform(self, X: FloatArray, sources: FloatArray) -> FloatArray:
        """Return the columns of features (M, P) and other devices' values (M, S): (M, Q)."""
        missing = np.isnan(X)
        filled = np.where(missing, self.fill, X)
        gaps = missing[:, self.gaps].astype(np.float64)
        logs = _logarithm(filled, self.floor)
        pairs = list(combinations_with_replacement(self.factors.tolist(), 2))
        products = np.empty((len(X), len(pairs)))
        for column, (left, right) in enumerate(pairs):
            products[:, column] = filled[:, left] * filled[:, right]
        plain = [filled[:, self.kept], gaps, logs[:, self.kept], gaps]
        columns = np.hstack([*plain, products, _logarithm(sources, self.source_floor)])
        return np.asarray((columns - self.centre) / self.spread)

    @property
    def raw(self) -> IndexArray:
        """Columns of the features as they are."""
        return np.arange(self._num_plain)

    @property
    def log(self) -> IndexArray:
        """Columns of the features' logarithms."""
        return self._num_plain + np.arange(self._num_plain)

    @property
    def products(self) -> IndexArray:
        """Columns of products of two features."""
        begin, num = 2 * self._num_plain, len(self.factors)
        return begin + np.arange(num * (num + 1) // 2)

    @property
    def sources(self) -> IndexArray:
        """Columns of other devices' values."""
        return 2 * self._num_plain + len(self.products) + np.arange(len(self.source_floor))

    @property
    def any_logarithm(self) -> bool:
        """Whether `log` differs from `raw`."""
        return bool(np.isfinite(self.floor[self.kept]).any())

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: State) -> LatencyDesign:
        """Rebuild a design."""
        return cls(**state)

    @property
    def _num_plain(self) -> int:
        return len(self.kept) + len(self.gaps)


def _floor(values: FloatArray) -> FloatArray:
    return np.where((values > 0).all(axis=0), 1e-3 * values.min(axis=0), np.nan)


def _logarithm(values: FloatArray, floor: FloatArray) -> FloatArray:
    """Return the logarithm of each column that has a floor, the others as they are."""
    logged = ~np.isnan(floor)
    return np.where(logged, np.log(np.maximum(values, np.where(logged, floor, 1.0))), values)


def _factors(filled: FloatArray, y: FloatArray, kept: IndexArray) -> IndexArray:
    """Return the features to multiply: all that vary, or those that go most with the target."""
    if len(kept) <= _MAX_FACTORS:
        return kept
    centred = filled[:, kept] - filled[:, kept].mean(axis=0)
    strength = np.abs(centred.T @ (y - y.mean())) / np.linalg.norm(centred, axis=0)
    return np.sort(kept[np.argsort(-strength, kind="stable")[:_MAX_FACTORS]])
