"""Any numeric matrix as comparable columns: no gaps, no heavy tails, mean 0, deviation 1.

Letters: N training rows, M rows, P given columns, Q columns made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.models.monotone import MonotoneMap

FloatArray = NDArray[np.float64]

# Prior scale of a product of two standardised columns: bends matter less than slopes.
PRODUCT_SCALE = 0.3
_MAX_MAIN = 5
_SAME = 0.9


@dataclass(frozen=True)
class ColumnMap:
    """Values mapped and standardised, then one indicator per distinct pattern of gaps.

    Attributes:
        used: indices of the given columns that vary, shape (U,).
        maps: one monotone map for each used column; none when the columns are taken as they are.
        centre, spread: of the mapped column, shape (U,).
        low, high: bounds on the standardised value, shape (U,); a value far outside what was
            seen counts as one half a range outside.
        gaps: indices of the given columns whose gaps are indicated, shape (G,).
        gap_share: share of gaps in those columns, shape (G,).
    """

    used: NDArray[np.int64]
    maps: tuple[MonotoneMap, ...]
    centre: FloatArray
    spread: FloatArray
    low: FloatArray
    high: FloatArray
    gaps: NDArray[np.int64]
    gap_share: FloatArray

    @staticmethod
    def of(X: FloatArray, standardise: bool = True) -> ColumnMap:
        """Learn the map from X of shape (N, P); NaN means "not there".

        Args:
            X: the columns.
            standardise: False leaves scale and tails alone and only centres the columns.
        """
        used = [j for j in range(X.shape[1]) if _varies(X[:, j])]
        maps, rows = [], []
        for j in used:
            values = X[np.isfinite(X[:, j]), j]
            if standardise:
                maps.append(MonotoneMap.of(values))
                values = maps[-1].forward(values)
            spread = float(values.std()) if standardise else 1.0
            half = 0.5 * float(np.ptp(values)) / spread
            unit = (values - values.mean()) / spread
            rows.append((values.mean(), spread, unit.min() - half, unit.max() + half))
        table = np.array(rows, dtype=np.float64).reshape(len(used), 4).T
        missing = np.isnan(X)
        patterns: dict[bytes, int] = {}
        for j in range(X.shape[1]):
            if missing[:, j].any() and not missing[:, j].all():
                patterns.setdefault(missing[:, j].tobytes(), j)
        gaps = np.array(list(patterns.values()), dtype=np.int64)
        share = missing[:, gaps].mean(axis=0)
        means, spreads, low, high = table
        columns = np.array(used, dtype=np.int64)
        return ColumnMap(columns, tuple(maps), means, spreads, low, high, gaps, share)

    @property
    def sources(self) -> NDArray[np.int64]:
        """Index of the given column behind each made one, shape (Q,)."""
        return np.concatenate([self.used, self.gaps])

    def transform(self, X: FloatArray) -> FloatArray:
        """Return the columns of X (M, P) as (M, Q): values with gaps at 0, then indicators."""
        values = X[:, self.used].astype(np.float64)
        there = np.isfinite(values)
        values = np.where(there, values, 0.0)
        for k, mapped in enumerate(self.maps):
            values[:, k] = mapped.forward(values[:, k])
        unit = np.clip((values - self.centre) / self.spread, self.low, self.high)
        gaps = np.isnan(X[:, self.gaps])
        indicator = (gaps - self.gap_share) / np.sqrt(self.gap_share * (1 - self.gap_share))
        return np.hstack([np.where(there, unit, 0.0), indicator])

    def state(self) -> dict[str, Any]:
        """Return the map as JSON values and arrays."""
        names = ("used", "centre", "spread", "low", "high", "gaps", "gap_share")
        return {
            "maps": [mapped.state() for mapped in self.maps],
            **{name: getattr(self, name) for name in names},
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> ColumnMap:
        """Rebuild the map from `state`."""
        maps = tuple(MonotoneMap.from_state(mapped) for mapped in state["maps"])
        return ColumnMap(**{**state, "maps": maps})


def main_columns(columns: FloatArray, z: FloatArray) -> NDArray[np.int64]:
    """Return the few columns that go with the target most, no two of them nearly the same.

    Args:
        columns: standardised, shape (N, Q).
        z: target, shape (N,).
    """
    strength = np.abs(correlation(columns, z))
    chosen: list[int] = []
    for j in np.argsort(-strength, kind="stable"):
        if len(chosen) == _MAX_MAIN or strength[j] < 1.0 / np.sqrt(len(z)):
            break
        same = np.abs(correlation(columns[:, chosen], columns[:, j]))
        if not (same > _SAME).any():
            chosen.append(int(j))
    return np.array(chosen, dtype=np.int64)


def products(columns: FloatArray, main: NDArray[np.int64]) -> FloatArray:
    """Return the squares and products of the main columns, shape (M, K (K + 1) / 2)."""
    left, right = np.triu_indices(len(main))
    return np.asarray(columns[:, main[left]] * columns[:, main[right]])


def correlation(columns: FloatArray, z: FloatArray) -> FloatArray:
    """Return Pearson's correlation of every column with z, shape (Q,); 0 for a constant one."""
    centred, target = columns - columns.mean(axis=0), z - z.mean()
    norms = np.sqrt((centred**2).sum(axis=0) * (target**2).sum())
    return np.asarray(centred.T @ target / np.where(norms > 0, norms, 1.0))


def _varies(column: FloatArray) -> bool:
    values = column[np.isfinite(column)]
    return bool(len(values) and np.ptp(values) > 1e-12 * np.abs(values).max())
