"""Weights of several models in one prediction, from what each says of rows it has not seen.

Letters: N training rows, Q columns, K models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from predictors.models.base import FloatArray

Pair = tuple[FloatArray, FloatArray]

# How far a weight is expected to lie from an equal share before any label is seen, in shares:
# two deviations reach from nothing to double.
_PRIOR_DEVIATION = 0.5


class Part(Protocol):
    """What a blend asks of each of its models; see `predictors.models.base.Model`."""

    def fit(self, X: FloatArray, y: FloatArray) -> Self:
        """Fit to features (N, Q) and targets (N,)."""
        ...

    def predict(self, X: FloatArray) -> Pair:
        """Return mean and standard deviation, each of shape (M,)."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        ...


def held_out(
    makers: Mapping[str, Callable[[], Part]],
    X: FloatArray,
    y: FloatArray,
    folds: NDArray[np.int64],
) -> dict[str, Pair]:
    """Return each model's means and deviations for rows while they were held out, shape (N,).

    Args:
        makers: by name, what makes each unfitted model.
        X: features, shape (N, Q).
        y: targets, shape (N,).
        folds: fold of every row, shape (N,), at least two different ones.
    """
    found = {name: (np.empty(len(y)), np.empty(len(y))) for name in makers}
    for fold in np.unique(folds):
        test = folds == fold
        for name, make in makers.items():
            mean, deviation = make().fit(X[~test], y[~test]).predict(X[test])
            found[name][0][test], found[name][1][test] = mean, deviation
    return found


def blend(means: FloatArray, deviations: FloatArray, weights: FloatArray) -> Pair:
    """Return mean and deviation, each of shape (M,), of a mixture of K models given as (M, K)."""
    # Sums along rows, not a matrix product: the same bits whatever else is predicted beside.
    mean = (means * weights).sum(axis=1)
    apart = (means - mean[:, None]) ** 2
    return mean, np.sqrt(((deviations**2 + apart) * weights).sum(axis=1))


def blend_weights(held_out_NK: FloatArray, y: FloatArray) -> FloatArray:
    """Return non-negative weights that sum to 1, shape (K,), drawn towards equal shares.

    The least-squares weights under a normal prior around 1/K: with few or noisy labels the
    shares stay nearly equal; a model that is really better takes over.

    Source: Breiman, "Stacked regressions" (1996), for non-negative weights on held-out values.
    """
    K = held_out_NK.shape[1]
    noise = float(((held_out_NK - y[:, None]) ** 2).mean(axis=0).min())
    pull = np.sqrt(noise) * K / _PRIOR_DEVIATION
    sum_to_one = 1e3 * np.sqrt(len(y))
    rows = np.vstack([held_out_NK, pull * np.eye(K), np.full((1, K), sum_to_one)])
    target = np.concatenate([y, np.full(K, pull / K), [sum_to_one]])
    weights = nnls(rows, target)[0]
    return np.asarray(weights / weights.sum())
