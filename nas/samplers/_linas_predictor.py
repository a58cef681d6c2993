"""The predictor of LINAS: ridge or a support vector machine, whichever cross-validates better.

Letters: N labels, G genes, P columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.encodings import Gene

FloatArray = NDArray[np.float64]
IntMatrix = NDArray[np.int64]

_ALPHAS = np.arange(1, 101) / 10.0
_COSTS = np.arange(1.0, 101.0)
_NUM_FOLDS = 5
_MAX_ONE_HOT = 64


class LinasPredictor:
    """Ridge (alpha 0.1 to 10) or RBF support vector regression (C 1 to 100, no tube).

    The mean absolute percentage error over five consecutive folds chooses among all of them.

    Source: the predictor of the program DyNAS-T, the reference implementation of Cummings et al.,
        "A Hardware-Aware System for Accelerating Deep Neural Network Optimization" (2022).
    """

    def fit(self, X: FloatArray, y: FloatArray) -> LinasPredictor:
        """Fit on features (N, P) and labels (N,); columns that never vary are left out."""
        from sklearn.linear_model import Ridge

        self._columns = np.flatnonzero(X.var(axis=0))
        largest = float(np.abs(y).max())
        self._unit = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
        self._mean = float(y.mean())
        self._model: Any = None
        if len(self._columns) == 0 or len(y) < 2:
            return self
        features, target = X[:, self._columns], y / self._unit
        ridge, machine = cross_validate(features, target)
        if ridge.min() <= machine.min():
            self._model = Ridge(alpha=_ALPHAS[ridge.argmin()])
        else:
            self._model = _machine(_COSTS[machine.argmin()])
        self._model.fit(features, target)
        return self

    def predict(self, X: FloatArray) -> FloatArray:
        """Return predictions in the labels' unit, shape (rows,)."""
        if self._model is None:
            return np.full(len(X), self._mean)
        return np.asarray(self._model.predict(X[:, self._columns]) * self._unit)


def cross_validate(X: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the mean absolute percentage error per alpha of ridge and per C of the machine."""
    from sklearn.model_selection import KFold

    folds = min(_NUM_FOLDS, len(y))
    ridge, machine = np.zeros(len(_ALPHAS)), np.zeros(len(_COSTS))
    for train, test in KFold(folds).split(X):
        scale = np.maximum(np.abs(y[test]), np.finfo(np.float64).eps)
        predicted = _ridge_path(X[train], y[train], X[test])
        ridge += (np.abs(predicted - y[test]) / scale).mean(axis=1) / folds
        for i, cost in enumerate(_COSTS):
            predicted = _machine(cost).fit(X[train], y[train]).predict(X[test])
            machine[i] += (np.abs(predicted - y[test]) / scale).mean() / folds
    return ridge, machine


def _ridge_path(X: FloatArray, y: FloatArray, at: FloatArray) -> FloatArray:
    """Return what ridge with an intercept predicts for every alpha, shape (alphas, rows of at)."""
    mean = X.mean(axis=0)
    U, s, Vt = np.linalg.svd(X - mean, full_matrices=False)
    shrunk = s / (s**2 + _ALPHAS[:, None]) * (U.T @ (y - y.mean()))
    return np.asarray(shrunk @ Vt @ (at - mean).T + y.mean())


def _machine(cost: float) -> Any:
    from sklearn.svm import SVR

    return SVR(kernel="rbf", gamma="auto", epsilon=0.0, C=cost, max_iter=1_000_000)


def one_hot(genes: Sequence[Gene], levels: IntMatrix) -> FloatArray:
    """Return one column per level, shape (N, P); one column 0..1 for a gene with very many."""
    parts = []
    for gene, column in zip(genes, levels.T, strict=True):
        if gene.num_levels <= _MAX_ONE_HOT:
            parts.append(np.eye(gene.num_levels)[column])
        else:
            parts.append((column / (gene.num_levels - 1))[:, None])
    return np.hstack(parts)
