"""A linear model on columns and on squares and products of the few that matter.

Letters: N training rows, M rows, Q columns, R columns with their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from predictors.models.base import FloatArray, State
from predictors.models.columns import PRODUCT_SCALE, correlation, main_columns, products
from predictors.models.pairwise import PairwiseLogistic
from predictors.models.prior_ridge import PriorRidge

# No column is ruled out by its correlation alone: what it adds to the others may matter.
_FLOOR = 0.03


class Engineered:
    """Widen the columns by products chosen on the training rows, then fit a linear model.

    Args:
        kind: ``ridge`` for `PriorRidge`, ``pairwise`` for `PairwiseLogistic`.
        groups: name of each column's group for the ridge; None sorts the columns into those that
            go with the target clearly and those that do not, so that the evidence can hold down
            the many in favour of the few.
        with_products: False leaves the columns as they are.
        emphasis: power of a column's correlation with the target by which the column is scaled:
            above 0, columns that rank well alone are trusted more.
        seed: of the linear model.
    """

    def __init__(
        self,
        kind: str,
        groups: Sequence[str] | None = None,
        with_products: bool = True,
        emphasis: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._kind, self._groups, self._seed = kind, groups, seed
        self._with_products, self._emphasis = with_products, emphasis

    def fit(self, X: FloatArray, y: FloatArray) -> Engineered:
        """Fit to standardised features (N, Q) and targets (N,)."""
        self._main = main_columns(X, y) if self._with_products else np.empty(0, dtype=np.int64)
        self._scale = _emphasised(X, y, self._emphasis)
        wide = self._widen(X)
        groups = _groups_by_strength(X, y) if self._groups is None else list(self._groups)
        groups = groups + ["product"] * (wide.shape[1] - X.shape[1])
        self._model: PriorRidge | PairwiseLogistic
        if self._kind == "ridge":
            # Bends are the business of the process and the trees beside it.
            self._model = PriorRidge(None, groups, self._seed, bends=False)
        else:
            self._model = PairwiseLogistic(self._seed)
        self._model.fit(wide, y)
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation, each of shape (M,)."""
        return self._model.predict(self._widen(X))

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        return {
            "kind": self._kind,
            "main": self._main,
            "scale": self._scale,
            "model": self._model.state(),
        }

    @classmethod
    def from_state(cls, state: State) -> Engineered:
        """Rebuild a fitted model."""
        model = cls(str(state["kind"]))
        inner = PriorRidge if state["kind"] == "ridge" else PairwiseLogistic
        model._main, model._scale = state["main"], state["scale"]
        model._model = inner.from_state(state["model"])
        return model

    def _widen(self, X: FloatArray) -> FloatArray:
        return np.hstack([X * self._scale, PRODUCT_SCALE * products(X, self._main)])


def _emphasised(X: FloatArray, y: FloatArray, power: float) -> FloatArray:
    """Return a scale for every column, at most 1, shape (Q,)."""
    strength = np.abs(correlation(X, rankdata(y))) ** power + _FLOOR
    return np.asarray(strength / strength.max())


def _groups_by_strength(X: FloatArray, y: FloatArray) -> list[str]:
    # Two standard errors of a correlation that is really zero.
    clear = np.abs(correlation(X, y)) > 2.0 / np.sqrt(len(y))
    return ["clear" if strong else "faint" for strong in clear]
