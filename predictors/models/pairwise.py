"""Ranking from comparisons: logistic regression on the differences of feature vectors.

Letters: N training rows, M rows, Q columns, A penalties tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from predictors.models.base import FloatArray, State
from predictors.models.folds import row_folds

_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
_MAX_ROWS = 1000
_MAX_TUNING_ROWS = 300
_MAX_STEPS = 30


class PairwiseLogistic:
    """Bradley-Terry model: P(i better than j) = sigmoid(w (x_i - x_j)), penalised by |w|^2.

    Only the order of the targets counts, so neither outliers nor the scale matter; a pair that
    is far apart adds next to nothing, close pairs decide. The score then becomes a target by a
    straight line through held-out scores.

    Args:
        seed: of the folds and of the rows taken when there are very many.

    Source: Bradley and Terry, "Rank analysis of incomplete block designs" (1952); Joachims
    (2002), section 4, for the linear ranking function on differences.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def fit(self, X: FloatArray, y: FloatArray) -> PairwiseLogistic:
        """Fit to features (N, Q) of comparable scale and targets (N,)."""
        rng = np.random.default_rng(self._seed)
        rows = rng.permutation(len(y))[:_MAX_ROWS]
        tuning = rows[:_MAX_TUNING_ROWS]
        penalty, scores = self._tune(X[tuning], y[tuning])
        self._weights = pairwise_weights(X[rows], y[rows], penalty)
        self._line = line_through(scores, y[tuning])
        residual = y[tuning] - self._line[0] - self._line[1] * scores
        self._deviation = float(np.sqrt(np.mean(residual**2)))
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation (the same for all rows), each of shape (M,)."""
        mean = self._line[0] + self._line[1] * (X @ self._weights)
        return mean, np.full(len(X), self._deviation)

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        return {
            "weights": self._weights,
            "line": list(self._line),
            "deviation": self._deviation,
            "seed": self._seed,
        }

    @classmethod
    def from_state(cls, state: State) -> PairwiseLogistic:
        """Rebuild a fitted model."""
        model = cls(int(state["seed"]))
        model._weights = state["weights"]
        model._line = (float(state["line"][0]), float(state["line"][1]))
        model._deviation = float(state["deviation"])
        return model

    def _tune(self, X: FloatArray, y: FloatArray) -> tuple[float, FloatArray]:
        """Return the penalty whose held-out scores order best, and those scores, shape (N,)."""
        folds = row_folds(X, 5, self._seed)
        held_out = np.zeros((len(_PENALTIES), len(y)))
        for fold in np.unique(folds):
            test = folds == fold
            if test.all():
                return 1.0, X @ pairwise_weights(X, y, 1.0)
            for k, penalty in enumerate(_PENALTIES):
                weights = pairwise_weights(X[~test], y[~test], penalty)
                held_out[k, test] = X[test] @ weights
        concordance = np.array([_agreement(scores, y) for scores in held_out])
        # A larger penalty wins unless a smaller one is better by more than chance gives.
        margin = 0.3 / len(y)
        best = int(np.flatnonzero(concordance >= concordance.max() - margin)[-1])
        return _PENALTIES[best], held_out[best]


def pairwise_weights(
    X: FloatArray, y: FloatArray, penalty: float, prior: FloatArray | None = None
) -> FloatArray:
    """Return the penalised maximum-likelihood weights, shape (Q,).

    The N (N - 1) / 2 comparisons share N labels, so they weigh as much as N: the loss is
    1/N sum over pairs. Newton's method on all pairs at once: gradient and curvature in w follow
    from the N x N matrix of probabilities, no difference vector is ever formed.

    Args:
        X: features, shape (N, Q).
        y: targets, shape (N,); only their order counts.
        penalty: half of it times the squared distance from the prior is added to the loss.
        prior: weights the penalty draws to, shape (Q,); None means 0.
    """
    centre = np.zeros(X.shape[1]) if prior is None else prior
    weights = centre.copy()
    better = 0.5 * (1.0 + np.sign(y[:, None] - y[None, :]))
    ridge = penalty * np.eye(X.shape[1])
    for _ in range(_MAX_STEPS):
        score = X @ weights
        chance = 0.5 * (1.0 + np.tanh(0.5 * (score[:, None] - score[None, :])))
        gradient = X.T @ (chance - better).sum(axis=1) / len(y) + penalty * (weights - centre)
        bend = chance * (1.0 - chance)
        curvature = X.T @ (bend.sum(axis=1)[:, None] * X - bend @ X) / len(y) + ridge
        step = np.linalg.solve(curvature, gradient)
        # The logistic loss is flat far out: an unbounded Newton step could overshoot for ever.
        size = float(np.abs(X @ step).max())
        weights = weights - step * min(1.0, 4.0 / max(size, 1e-12))
        if size < 1e-5:
            break
    return weights


def pairwise_deviance(scores: FloatArray, y: FloatArray) -> float:
    """Return the mean negative log-likelihood of the order of y at the best scale of the scores."""
    unit = scores / max(float(scores.std()), 1e-12)
    slope = pairwise_weights(unit[:, None], y, 1e-2)[0]
    gap = slope * (unit[:, None] - unit[None, :]) * np.sign(y[:, None] - y[None, :])
    return float(np.logaddexp(0.0, -gap).mean())


def _agreement(scores: FloatArray, y: FloatArray) -> float:
    """Kendall's tau-a: agreeing minus disagreeing pairs, as a share of all."""
    signs = np.sign(scores[:, None] - scores[None, :]) * np.sign(y[:, None] - y[None, :])
    return float(signs.sum() / max(len(y) * (len(y) - 1), 1))


def line_through(scores: FloatArray, y: FloatArray) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line; it never turns the order round."""
    centred = scores - scores.mean()
    variance = float(centred @ centred)
    slope = max(float(centred @ y) / variance, 1e-6) if variance > 1e-12 else 1e-6
    return float(y.mean() - slope * scores.mean()), slope
