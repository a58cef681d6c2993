"""Ranks of the few columns that each order the labels best, averaged: hardly anything to fit.

Letters: N training rows, M rows, Q columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from predictors.models.base import FloatArray, State
from predictors.models.pairwise import line_through


class ColumnVote:
    """Weighted mean of column ranks; a column's weight falls with how far it is behind the best.

    With twenty labels a column that ranks well alone (a good training-free metric, a parameter
    count) beats any fitted combination. Columns whose Kendall tau with the labels is within the
    error of the best one's share the vote: weight exp((tau - best) / standard error).

    Source: Kendall, "Rank Correlation Methods" (1948), for the standard error of tau.
    """

    def fit(self, X: FloatArray, y: FloatArray) -> ColumnVote:
        """Fit to features (N, Q) and targets (N,)."""
        n = len(y)
        tau = _taus(X, y)
        error = np.sqrt(2.0 * (2 * n + 5) / (9.0 * n * max(n - 1, 1)))
        weights = np.exp((np.abs(tau) - np.abs(tau).max()) / (0.5 * error))
        self._weights = np.sign(tau) * weights / weights.sum()
        self._sorted = np.sort(X, axis=0)
        votes = self._votes(X)
        self._line = line_through(votes, y)
        residual = y - self._line[0] - self._line[1] * votes
        self._deviation = float(np.sqrt(np.mean(residual**2)))
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation (the same for all rows), each of shape (M,)."""
        mean = self._line[0] + self._line[1] * self._votes(X)
        return mean, np.full(len(X), self._deviation)

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        return {
            "weights": self._weights,
            "sorted": self._sorted,
            "line": list(self._line),
            "deviation": self._deviation,
        }

    @classmethod
    def from_state(cls, state: State) -> ColumnVote:
        """Rebuild a fitted model."""
        model = cls()
        model._weights, model._sorted = state["weights"], state["sorted"]
        model._line = (float(state["line"][0]), float(state["line"][1]))
        model._deviation = float(state["deviation"])
        return model

    def _votes(self, X: FloatArray) -> FloatArray:
        """Return the weighted mean rank among the training rows, 0 to 1, shape (M,)."""
        total = np.zeros(len(X))
        for j in np.flatnonzero(self._weights):
            known = self._sorted[:, j]
            below = np.searchsorted(known, X[:, j], side="left")
            up_to = np.searchsorted(known, X[:, j], side="right")
            total += self._weights[j] * _between(known, X[:, j], below + up_to) / (2 * len(known))
        return total


def _between(known: FloatArray, values: FloatArray, twice_rank: Any) -> FloatArray:
    """Refine the doubled rank of values that fall between two known ones, so order is kept."""
    upper = np.clip(np.searchsorted(known, values, side="left"), 1, len(known) - 1)
    low, high = known[upper - 1], known[upper]
    inside = (values > low) & (values < high)
    gap = np.where(high > low, high - low, 1.0)
    # Twice a rank steps by one to either side of a gap's middle.
    return np.asarray(twice_rank + np.where(inside, (values - low) / gap * 2.0 - 1.0, 0.0) * 0.5)


def _taus(X: FloatArray, y: FloatArray) -> FloatArray:
    """Kendall's tau-b of every column with y, shape (Q,); 0 for a constant column."""
    rows = slice(0, 500)
    signs_y = np.sign(y[rows, None] - y[None, rows])
    taus = np.zeros(X.shape[1])
    for j in range(X.shape[1]):
        signs = np.sign(X[rows, None, j] - X[None, rows, j])
        size = np.sqrt(np.abs(signs).sum() * np.abs(signs_y).sum())
        taus[j] = (signs * signs_y).sum() / size if size > 0 else 0.0
    return taus
