"""Columns that are one gene repeated over layers, found by their values; totals over them.

Letters: N training rows, M rows, P given columns, E columns added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_SMALLEST = 3
_MAX_VALUES = 32
# What one layer may deviate from what its total says, as a share of the total's effect.
_DEVIATION = 0.3


@dataclass(frozen=True)
class Families:
    """Which columns take the same few values, so that their sum means something.

    A network's quality hangs on totals over its layers far more than on any one layer. Columns
    of one family therefore get the prior scale of one of many, and the family's total and its
    trend over the columns are added. Switches (two values) get no total: in a one-hot encoding
    it would be the same for all.

    Attributes:
        members: indices of each family's columns, at least three each.
        counted: for each family whether its columns take more than two values.
        num_given: number of given columns, P.
    """

    members: tuple[NDArray[np.int64], ...]
    counted: tuple[bool, ...]
    num_given: int

    @staticmethod
    def of(X: FloatArray) -> Families:
        """Find the families of X, shape (N, P); NaN means "not there"."""
        found: dict[bytes, list[int]] = {}
        sizes: dict[bytes, int] = {}
        for j in range(X.shape[1]):
            values = np.unique(X[np.isfinite(X[:, j]), j])
            # As many values as rows is a measured quantity; few of many rows is a choice.
            if 2 <= len(values) <= min(_MAX_VALUES, max(2, len(X) // 3)):
                found.setdefault(values.tobytes(), []).append(j)
                sizes[values.tobytes()] = len(values)
        kept = [key for key, columns in found.items() if len(columns) >= _SMALLEST]
        return Families(
            tuple(np.array(found[key], dtype=np.int64) for key in kept),
            tuple(sizes[key] > 2 for key in kept),
            X.shape[1],
        )

    @staticmethod
    def none(X: FloatArray) -> Families:
        """Return no families for columns of X, shape (N, P)."""
        return Families((), (), X.shape[1])

    def extend(self, X: FloatArray) -> FloatArray:
        """Return X (M, P) with total and trend of each counted family, shape (M, P + E)."""
        added = []
        for columns, counted in zip(self.members, self.counted, strict=True):
            if counted:
                values = np.nan_to_num(X[:, columns], nan=0.0)
                position = np.linspace(-1.0, 1.0, len(columns))
                # Sums along rows, not a matrix product: the same bits for any number of rows.
                added += [values.sum(axis=1), (values * position).sum(axis=1)]
        return np.column_stack([X, *added]) if added else X

    def scale(self) -> FloatArray:
        """Return the prior scale of every column, shape (P + E,)."""
        scale = np.ones(self.num_given + 2 * sum(self.counted))
        for columns, counted in zip(self.members, self.counted, strict=True):
            scale[columns] = (_DEVIATION if counted else 1.0) / np.sqrt(len(columns))
        return scale

    def state(self) -> dict[str, Any]:
        """Return the families as JSON values and arrays."""
        return {
            "members": list(self.members),
            "counted": list(self.counted),
            "num_given": self.num_given,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Families:
        """Rebuild the families from `state`."""
        counted = tuple(bool(flag) for flag in state["counted"])
        return Families(tuple(state["members"]), counted, int(state["num_given"]))
