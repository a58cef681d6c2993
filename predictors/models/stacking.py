"""A weighted mean of several models, weighted by how they do on rows held out.

Letters: N training rows, M rows to predict, P columns, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from predictors.models.base import FloatArray, Model, State
from predictors.models.boosting import BoostedTrees
from predictors.models.folds import row_folds
from predictors.models.gaussian_process import GaussianProcess

_NUM_FOLDS = 5
# With few rows a fold more or less is felt, and intervals from fewer would be too wide.
_FEW_ROWS, _MANY_FOLDS = 60, 10
# Beyond this many rows a process's parameters hardly depend on one fold: the closed form serves.
_MANY_ROWS = 100
# Weights below this are left out, with their models.
_MIN_WEIGHT = 0.02
# Weights fall with a power of the error: alike models share, worse ones drop out. The power grows
# with the rows that the errors are known from.
_SHARPNESS, _SHARPER_PER_ROW = 8.0, 0.02

# Rows without residual that are imagined beside the real ones when a median is taken.
_SHIFT_PRIOR = 50

KINDS: dict[str, type[Model]] = {"process": GaussianProcess, "trees": BoostedTrees}


@dataclass(frozen=True)
class Candidate:
    """A model that may enter the mean.

    Args:
        name: says what it is.
        columns: of the design matrix that it sees.
        make: makes it, unfitted.
    """

    name: str
    columns: slice | NDArray[np.int64]
    make: Callable[[], Model]


class Stack:
    """Fit all candidates; weigh them by their absolute error on rows held out.

    Source: Wolpert, Stacked generalization, 1992; Breiman, Stacked regressions, 1996.

    Args:
        seed: of the folds.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, candidates: Sequence[Candidate], X: FloatArray, y: FloatArray) -> Self:
        """Fit to a design matrix (N, P) and targets (N,)."""
        num_folds = _MANY_FOLDS if len(y) <= _FEW_ROWS else _NUM_FOLDS
        fold_of = row_folds(X, num_folds, self.seed)
        models = [entry.make().fit(X[:, entry.columns], y) for entry in candidates]
        held_out = [
            _held_out(model, entry, X[:, entry.columns], y, fold_of)
            for entry, model in zip(candidates, models, strict=True)
        ]
        mean_CN, std_CN = (np.stack(part) for part in zip(*held_out, strict=True))
        weights = stacking_weights(mean_CN, y)
        kept = np.flatnonzero(weights).tolist()
        self.names = [candidates[i].name for i in kept]
        self.weights = weights[kept]
        self._columns = [_indices(candidates[i].columns, X.shape[1]) for i in kept]
        self._models = [models[i] for i in kept]
        self.held_out = self.weights @ mean_CN[kept], self.weights @ std_CN[kept]
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation at a design matrix (M, P), (M,) each."""
        mean, std = np.zeros(len(X)), np.zeros(len(X))
        for weight, columns, model in zip(self.weights, self._columns, self._models, strict=True):
            one_mean, one_std = model.predict(np.ascontiguousarray(X[:, columns]))
            mean += weight * one_mean
            std += weight * one_std
        return mean, std

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        kinds = {model: kind for kind, model in KINDS.items()}
        return {
            "seed": self.seed,
            "names": self.names,
            "weights": self.weights,
            "columns": self._columns,
            "kinds": [kinds[type(model)] for model in self._models],
            "models": [model.state() for model in self._models],
            "held_out": list(self.held_out),
        }

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild a fitted stack."""
        stack = cls(state["seed"])
        stack.names, stack.weights = state["names"], state["weights"]
        stack._columns = state["columns"]
        pairs = zip(state["kinds"], state["models"], strict=True)
        stack._models = [KINDS[kind].from_state(model) for kind, model in pairs]
        stack.held_out = (state["held_out"][0], state["held_out"][1])
        return stack


def stacking_weights(mean_CN: FloatArray, y: FloatArray) -> FloatArray:
    """Return non-negative weights (C,) that sum to one, from predictions held out (C, N)."""
    error = np.abs(mean_CN - y).mean(axis=1)
    power = _SHARPNESS + _SHARPER_PER_ROW * len(y)
    weights = (np.maximum(error.min(), 1e-300) / np.maximum(error, 1e-300)) ** power
    weights = weights / weights.sum()
    weights = np.where(weights < _MIN_WEIGHT, 0.0, weights)
    return np.asarray(weights / weights.sum())


def median_shift(residual: FloatArray, relative: bool) -> float:
    """Return the shift that makes the mean absolute (or relative) residual smallest.

    Relative errors of predictions m are |exp(m - y) - 1|: rows that are overestimated weigh more.
    """
    order = np.argsort(residual)
    weights = np.exp(-residual[order]) if relative else np.ones(len(residual))
    half = np.searchsorted(np.cumsum(weights), 0.5 * weights.sum())
    return float(residual[order][half]) * len(residual) / (len(residual) + _SHIFT_PRIOR)


def _held_out(
    model: Model, candidate: Candidate, X: FloatArray, y: FloatArray, fold_of: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard deviation of each row from models that have not seen it."""
    if isinstance(model, GaussianProcess) and len(y) > _MANY_ROWS:
        return model.leave_one_out()
    mean, std = np.empty(len(y)), np.empty(len(y))
    for fold in range(int(fold_of.max()) + 1):
        test = fold_of == fold
        other = candidate.make().fit(X[~test], y[~test])
        mean[test], std[test] = other.predict(X[test])
    return mean, std


def _indices(columns: slice | NDArray[np.int64], num: int) -> NDArray[np.int64]:
    return np.arange(num)[columns].astype(np.int64)
