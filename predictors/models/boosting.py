"""Gradient boosted trees with absolute loss, evaluated and stored as plain arrays.

Letters: N training rows, M rows to predict, P features, T trees, V nodes of all trees.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from predictors.models.base import FloatArray, State

_NUM_TREES = 150
_RATE = 0.1
_SUBSAMPLE = 0.7
_COLUMN_SHARE = 0.5
_ARRAYS = ("feature", "threshold", "left", "right", "value")


class BoostedTrees:
    """Boosted regression trees that fit the conditional median.

    scikit-learn grows each tree on the signs of the residuals; its leaves then take the median
    residual. What was grown is copied into arrays, so that a saved model needs no pickle.
    Source: Friedman, Greedy Function Approximation, 2001, algorithm 3 (LAD_TreeBoost), and
    Stochastic Gradient Boosting, 2002, for the draws of rows.

    Args:
        seed: of the draws of rows and columns per tree.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, X: FloatArray, y: FloatArray) -> Self:
        """Grow the trees; X (N, P), y (N,)."""
        from sklearn.tree import DecisionTreeRegressor

        num, rng = len(y), np.random.default_rng(self.seed)
        columns = np.ascontiguousarray(X, dtype=np.float32)
        self._base = float(np.median(y))
        residual = y - self._base
        trees, values = [], []
        for number in range(_NUM_TREES):
            rows = rng.permutation(num)[: max(int(_SUBSAMPLE * num), 1)]
            grown = DecisionTreeRegressor(
                max_depth=4 if num >= 500 else 3,
                min_samples_leaf=min(max(num // 20, 3), 10),
                max_features=_COLUMN_SHARE,
                random_state=(self.seed + number) % 2**32,
            ).fit(columns[rows], np.sign(residual[rows]), check_input=False)
            leaf_of = grown.tree_.apply(columns)
            value = _RATE * _medians(leaf_of[rows], residual[rows], grown.tree_.node_count)
            residual = residual - value[leaf_of]
            trees.append(grown.tree_)
            values.append(value)
        self._flatten(trees, values)
        self._std = float(np.std(residual))
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the prediction and the deviation of the training residuals, (M,) each."""
        return self._sum(X), np.full(len(X), self._std)

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        arrays = {name: getattr(self, f"_{name}") for name in (*_ARRAYS, "roots")}
        facts = {"seed": self.seed, "base": self._base, "std": self._std, "depth": self._depth}
        return {**arrays, **facts}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild fitted trees."""
        trees = cls(state["seed"])
        for name in (*_ARRAYS, "roots", "base", "std", "depth"):
            setattr(trees, f"_{name}", state[name])
        return trees

    def _flatten(self, trees: list[Any], values: list[FloatArray]) -> None:
        """Put all trees into one table of nodes; a leaf is its own child on both sides."""
        self._roots = np.cumsum([0] + [tree.node_count for tree in trees[:-1]]).astype(np.int64)
        left, right = [], []
        for root, tree in zip(self._roots, trees, strict=True):
            own = np.arange(tree.node_count)
            leaf = tree.children_left < 0
            left.append(root + np.where(leaf, own, tree.children_left))
            right.append(root + np.where(leaf, own, tree.children_right))
        self._left = np.concatenate(left).astype(np.int64)
        self._right = np.concatenate(right).astype(np.int64)
        features = np.concatenate([tree.feature for tree in trees])
        self._feature = np.maximum(features, 0).astype(np.int64)
        self._threshold = np.concatenate([tree.threshold for tree in trees])
        self._value = np.concatenate(values)
        self._depth = max(int(tree.max_depth) for tree in trees)

    def _sum(self, X: FloatArray) -> FloatArray:
        # scikit-learn's thresholds are for features rounded to single precision.
        rounded = X.astype(np.float32)
        rows = np.arange(len(X))[:, None]
        node_MT = np.broadcast_to(self._roots, (len(X), len(self._roots)))
        for _ in range(self._depth):
            goes_left = rounded[rows, self._feature[node_MT]] <= self._threshold[node_MT]
            node_MT = np.where(goes_left, self._left[node_MT], self._right[node_MT])
        return np.asarray(self._base + self._value[node_MT].sum(axis=1))


def _medians(leaf_of: NDArray[np.int64], residual: FloatArray, num_nodes: int) -> FloatArray:
    """Return the median residual of each node (0 for nodes without rows), shape (num_nodes,)."""
    order = np.lexsort((residual, leaf_of))
    count = np.bincount(leaf_of, minlength=num_nodes)
    end = np.cumsum(count)
    low = np.minimum(end - count + np.maximum(count - 1, 0) // 2, len(order) - 1)
    high = np.minimum(end - count + count // 2, len(order) - 1)
    middle = 0.5 * (residual[order[low]] + residual[order[high]])
    return np.where(count > 0, middle, 0.0)
