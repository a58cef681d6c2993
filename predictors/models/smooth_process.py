"""Gaussian process of a straight plane plus a smooth bend, one length scale for all columns.

Letters: N training rows, M rows, Q columns.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from predictors.models.base import FloatArray, State

_LENGTHS = (1.0, 2.0, 4.0)
_BENDS = (0.1, 0.5, 0.9)
_NOISES = np.geomspace(1e-4, 3.0, 12)
_MAX_TUNING_ROWS = 120
_MAX_ROWS = 1500


class SmoothProcess:
    """Kernel (1 - b) x x' / q + b matern_2.5(|x - x'| / (l sqrt(q))), q the mean of |x|^2.

    One length scale, not one per column: with few labels and many columns the evidence cannot
    tell the scales of columns apart. Length, share of the bend and noise maximise the evidence
    over a small grid.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm
    2.1, equations 4.17 and 5.8.

    Args:
        seed: of the rows taken when there are very many.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def fit(self, X: FloatArray, y: FloatArray) -> SmoothProcess:
        """Fit to features (N, Q) of mean about 0 and targets (N,)."""
        rows = np.random.default_rng(self._seed).permutation(len(y))[:_MAX_ROWS]
        self._mean = float(y[rows].mean())
        self._X, z = X[rows], y[rows] - self._mean
        self._size = max(float((self._X**2).sum(axis=1).mean()), 1e-12)
        self._length, self._bend, noise = self._tune(self._X[:_MAX_TUNING_ROWS], z)
        kernel = self._kernel(self._X, self._length, self._bend)
        self._root = cho_factor(kernel + noise * np.eye(len(z)), lower=True)[0]
        self._dual = cho_solve((self._root, True), z)
        self._variance = max(float(z @ self._dual) / len(z), 1e-12)
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation of the noise-free value, each of shape (M,)."""
        cross = self._kernel(X, self._length, self._bend)
        explained = (solve_triangular(self._root, cross.T, lower=True) ** 2).sum(axis=0)
        own = (1 - self._bend) * (X**2).sum(axis=1) / self._size + self._bend
        variance = self._variance * np.maximum(own - explained, 1e-12)
        return cross @ self._dual + self._mean, np.sqrt(variance)

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        names = ("X", "root", "dual", "mean", "size", "length", "bend", "variance", "seed")
        return {name: getattr(self, f"_{name}") for name in names}

    @classmethod
    def from_state(cls, state: State) -> SmoothProcess:
        """Rebuild a fitted model."""
        model = cls(int(state["seed"]))
        for name, value in state.items():
            setattr(model, f"_{name}", value)
        return model

    def _kernel(self, X: FloatArray, length: float, bend: float) -> FloatArray:
        inner = X @ self._X.T
        squares = (X**2).sum(axis=1)[:, None] + (self._X**2).sum(axis=1)[None, :] - 2 * inner
        distance = np.sqrt(5.0 * np.maximum(squares, 0.0) / self._size) / length
        matern = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
        return np.asarray((1 - bend) * inner / self._size + bend * matern)

    def _tune(self, X: FloatArray, z: FloatArray) -> tuple[float, float, float]:
        """Return length, share of the bend and noise of the largest evidence."""
        target = z[: len(X)]
        best, chosen = -np.inf, (2.0, 0.5, 0.1)
        for length, bend in product(_LENGTHS, _BENDS):
            kernel = self._kernel(X, length, bend)[:, : len(X)]
            values, vectors = np.linalg.eigh(kernel)
            total = np.maximum(values, 0.0)[None, :] + _NOISES[:, None]
            variance = ((vectors.T @ target) ** 2 / total).mean(axis=1)
            evidence = -len(X) * np.log(np.maximum(variance, 1e-300)) - np.log(total).sum(axis=1)
            k = int(np.argmax(evidence))
            if evidence[k] > best:
                best, chosen = float(evidence[k]), (length, bend, float(_NOISES[k]))
        return chosen
