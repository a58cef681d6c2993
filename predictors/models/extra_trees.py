"""Extremely randomised trees as plain arrays: fitted by scikit-learn, evaluated here.

Letters: N training rows, M rows, Q columns, T trees, K nodes of all trees together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor

from predictors.models.base import FloatArray, State

_NUM_TREES = 64
_CHUNK = 4096


class ExtraTrees:
    """Mean of trees that split at random places; says what interacts without being told.

    Args:
        seed: of the splits.

    Source: Geurts, Ernst and Wehenkel, "Extremely randomized trees" (2006).
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def fit(self, X: FloatArray, y: FloatArray) -> ExtraTrees:
        """Fit to features (N, Q) and targets (N,)."""
        forest = ExtraTreesRegressor(
            _NUM_TREES, min_samples_leaf=2, max_features=0.5, random_state=self._seed
        ).fit(X, y)
        trees = [tree.tree_ for tree in forest.estimators_]
        sizes = [tree.node_count for tree in trees]
        self._roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        starts = np.repeat(self._roots, sizes)
        left = np.concatenate([tree.children_left for tree in trees])
        right = np.concatenate([tree.children_right for tree in trees])
        own = np.arange(len(left))
        # A leaf points at itself: then every row can walk the same number of steps.
        self._left = np.where(left < 0, own, left + starts)
        self._right = np.where(left < 0, own, right + starts)
        self._feature = np.maximum(np.concatenate([tree.feature for tree in trees]), 0)
        self._threshold = np.concatenate([tree.threshold for tree in trees])
        self._value = np.concatenate([tree.value[:, 0, 0] for tree in trees])
        self._depth = max(int(tree.max_depth) for tree in trees)
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and deviation over the trees, each of shape (M,)."""
        blocks = [self._values(X[at : at + _CHUNK]) for at in range(0, len(X), _CHUNK)]
        values_MT = np.concatenate([np.empty((0, len(self._roots))), *blocks])
        return values_MT.mean(axis=1), values_MT.std(axis=1)

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        names = ("roots", "left", "right", "feature", "threshold", "value", "depth", "seed")
        return {name: getattr(self, f"_{name}") for name in names}

    @classmethod
    def from_state(cls, state: State) -> ExtraTrees:
        """Rebuild a fitted model."""
        model = cls(int(state["seed"]))
        for name, value in state.items():
            setattr(model, f"_{name}", value)
        return model

    def _values(self, X: FloatArray) -> FloatArray:
        # Trees were grown on float32 copies of the columns and compare as such.
        columns = X.astype(np.float32)
        rows = np.arange(len(X))[:, None]
        nodes_MT = np.tile(self._roots, (len(X), 1))
        for _ in range(self._depth):
            goes_left = columns[rows, self._feature[nodes_MT]] <= self._threshold[nodes_MT]
            nodes_MT = np.where(goes_left, self._left[nodes_MT], self._right[nodes_MT])
        return np.asarray(self._value[nodes_MT])
