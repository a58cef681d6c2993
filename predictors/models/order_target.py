"""A target on the scale on which its order is learned best.

Letters: N labels, S knots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.isotonic import isotonic_regression

from predictors.models.base import FloatArray
from predictors.models.blend import Part

_TAIL = 0.1


@dataclass(frozen=True)
class OrderMap:
    """Increasing piecewise linear map through knots; straight lines beyond the ends.

    Attributes:
        values: knots on the given scale, increasing, shape (S,).
        mapped: knots on the scale of the order, increasing, shape (S,).
    """

    values: FloatArray
    mapped: FloatArray

    @staticmethod
    def of(z: FloatArray, scores: FloatArray) -> OrderMap:
        """Learn the map from targets (N,) and held-out scores of a ranking model (N,).

        Half of it is the rank, half the mean score at that rank (isotonic regression): where
        scores hardly change while the target does, the target's changes are mostly noise, and
        the map is flat there, so errors are about equally large everywhere. This is one step of
        alternating conditional expectations.

        Source: Breiman and Friedman, "Estimating optimal transformations" (1985).
        """
        order = np.argsort(z, kind="stable")
        mean_score = np.empty(len(z))
        mean_score[order] = isotonic_regression(scores[order])
        mapped = _unit(rankdata(z)) + _unit(mean_score)
        values, place = np.unique(z, return_inverse=True)
        at_value = np.bincount(place, mapped) / np.bincount(place)
        return OrderMap(values, _unit(at_value))

    def forward(self, z: FloatArray) -> FloatArray:
        """Return the mapped targets."""
        return _interpolate(z, self.values, self.mapped)

    def backward(self, mapped: FloatArray) -> FloatArray:
        """Return the targets that `forward` maps to `mapped`."""
        return _interpolate(mapped, self.mapped, self.values)

    def slope(self, mapped: FloatArray) -> FloatArray:
        """Return the derivative of `backward`, over a tenth of the range to smooth single knots."""
        step = 0.5 * _TAIL * float(np.ptp(self.mapped))
        return (self.backward(mapped + step) - self.backward(mapped - step)) / (2 * step)

    def state(self) -> dict[str, Any]:
        """Return the knots."""
        return {"values": self.values, "mapped": self.mapped}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> OrderMap:
        """Rebuild the map from `state`."""
        return OrderMap(state["values"], state["mapped"])


def _unit(values: FloatArray) -> FloatArray:
    spread = float(values.std())
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def _interpolate(at: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """Interpolate; beyond the ends go on with the slope of the outer tenth of the knots."""
    k = max(1, round(_TAIL * (len(x) - 1)))
    below = (y[k] - y[0]) / (x[k] - x[0])
    above = (y[-1] - y[-1 - k]) / (x[-1] - x[-1 - k])
    inside = np.interp(at, x, y)
    return inside + below * np.minimum(at - x[0], 0.0) + above * np.maximum(at - x[-1], 0.0)


class OnOrder:
    """A model that learns the target on the scale of its order.

    Args:
        inner: the model, unfitted.
        order: the scale.
    """

    def __init__(self, inner: Part, order: OrderMap) -> None:
        self._inner, self._order = inner, order

    def fit(self, X: FloatArray, y: FloatArray) -> OnOrder:
        """Fit to features (N, Q) and targets (N,)."""
        self._inner.fit(X, self._order.forward(y))
        return self

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation on the target's own scale, each of shape (M,)."""
        mean, deviation = self._inner.predict(X)
        return self._order.backward(mean), deviation * self._order.slope(mean)

    def state(self) -> dict[str, Any]:
        """Return the inner model's state; the scale is shared and kept by who made it."""
        return self._inner.state()
