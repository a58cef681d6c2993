"""The models of the quality regressor and how they are put together.

Letters: N labels, M candidates, Q columns, K models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from predictors.models.base import FloatArray, State
from predictors.models.blend import Pair, Part, blend, blend_weights, held_out
from predictors.models.column_vote import ColumnVote
from predictors.models.engineered import Engineered
from predictors.models.extra_trees import ExtraTrees
from predictors.models.folds import row_folds
from predictors.models.order_target import OnOrder, OrderMap
from predictors.models.smooth_process import SmoothProcess

Makers = dict[str, Callable[[], Part]]

_TREES_FROM = 50
# The scale of the order is itself learned: from fewer labels it is mostly noise.
_ORDER_FROM = 40
# Held-out error, as a share of the target's spread, below which there is no noise to speak of.
_CLEAN = 0.2
_KINDS: dict[str, type[Engineered] | type[ColumnVote] | type[SmoothProcess] | type[ExtraTrees]] = {
    "pairwise": Engineered,
    "strong": Engineered,
    "vote": ColumnVote,
    "ridge": Engineered,
    "process": SmoothProcess,
    "trees": ExtraTrees,
}
_CURVES = {"ridge", "process", "trees"}


class RankEnsemble:
    """Rankers, ridge, Gaussian process and, from 50 labels on, trees in one blend.

    Rankers see only the order of the target. The others learn the target as it is while it is
    nearly noise-free or labels are few, else on the scale of its order (`OrderMap`), on which
    noise that grows and shrinks along the target is about even.

    Args:
        groups: name of each column's group for the ridge, Q of them, or None.
        scaled_columns: whether the columns' scales say what each is worth. Then no products are
            made and no single columns are sought that rank well alone.
        seed: of folds and trees.
    """

    def __init__(
        self, groups: Sequence[str] | None = None, scaled_columns: bool = False, seed: int = 0
    ) -> None:
        self._groups, self._scaled_columns, self._seed = groups, scaled_columns, seed

    def fit(self, X: FloatArray, y: FloatArray) -> RankEnsemble:
        """Fit to standardised features (N, Q) and robustly scaled targets (N,)."""
        makers = self._makers(len(y))
        folds = row_folds(X, _num_folds(len(y)), self._seed)
        self._order: OrderMap | None = None
        self.weights, self._std_factor = np.full(len(makers), 1.0 / len(makers)), 1.0
        if folds.max() >= 2:
            # Trees are dear and say nothing about noise: they wait until the scale is known.
            quick = {name: make for name, make in makers.items() if name != "trees"}
            found = held_out(quick, X, y, folds)
            late = {name: make for name, make in makers.items() if name == "trees"}
            if len(y) >= _ORDER_FROM and not _is_clean(found, y):
                self._order = OrderMap.of(y, found["pairwise"][0])
                late = {
                    name: _on_order(makers[name], self._order) for name in _CURVES & makers.keys()
                }
            makers, found = {**makers, **late}, {**found, **held_out(late, X, y, folds)}
            parts = (found[name] for name in makers)
            means, deviations = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
            self.weights = blend_weights(means, y)
            mean, deviation = blend(means, deviations, self.weights)
            error, claimed = float(((mean - y) ** 2).mean()), float((deviation**2).mean())
            self._std_factor = float(np.sqrt(error / max(claimed, 1e-12)))
        self.models: dict[str, Part] = {name: make().fit(X, y) for name, make in makers.items()}
        return self

    def predict(self, X: FloatArray) -> Pair:
        """Return mean and standard deviation, noise of a label included, each of shape (M,)."""
        means, deviations = np.empty((2, len(X), len(self.models)))
        for k, model in enumerate(self.models.values()):
            means[:, k], deviations[:, k] = model.predict(X)
        mean, deviation = blend(means, deviations, self.weights)
        return mean, deviation * self._std_factor

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        return {
            "models": {name: model.state() for name, model in self.models.items()},
            "weights": self.weights,
            "std_factor": self._std_factor,
            "order": None if self._order is None else self._order.state(),
        }

    @classmethod
    def from_state(cls, state: State) -> RankEnsemble:
        """Rebuild a fitted model."""
        model = cls()
        model._order = None if state["order"] is None else OrderMap.from_state(state["order"])
        model.models = {}
        # In the order of fitting: sums in another order would differ in the last bit.
        for name, kind in _KINDS.items():
            if name in state["models"]:
                part: Part = kind.from_state(state["models"][name])
                if model._order is not None and name in _CURVES:
                    part = OnOrder(part, model._order)
                model.models[name] = part
        model.weights, model._std_factor = state["weights"], float(state["std_factor"])
        return model

    def _makers(self, num_labels: int) -> Makers:
        groups, scaled, seed = self._groups, self._scaled_columns, self._seed
        makers: Makers = {"pairwise": lambda: Engineered("pairwise", groups, not scaled, 0.0, seed)}
        if not scaled:
            makers["strong"] = lambda: Engineered("pairwise", groups, False, 2.0, seed)
            makers["vote"] = ColumnVote
        makers["ridge"] = lambda: Engineered("ridge", groups, not scaled, 0.0, seed)
        makers["process"] = lambda: SmoothProcess(seed)
        if num_labels >= _TREES_FROM:
            makers["trees"] = lambda: ExtraTrees(seed)
        return makers


def _on_order(make: Callable[[], Part], order: OrderMap) -> Callable[[], Part]:
    return lambda: OnOrder(make(), order)


def _num_folds(num_labels: int) -> int:
    """Many folds where every label counts, few where a fit is dear."""
    return 10 if num_labels < _TREES_FROM else 5 if num_labels < 400 else 3


def _is_clean(found: Mapping[str, Pair], y: FloatArray) -> bool:
    """Whether the best model's held-out error is a small part of the target's spread."""
    error = min(float(np.abs(mean - y).mean()) for mean, _ in found.values())
    return bool(error < _CLEAN * np.abs(y - np.median(y)).mean())
