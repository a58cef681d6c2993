"""The slow drift of a device along the order of its measurements.

Clocks, temperatures and neighbours put a device into states that last for many measurements and
move all latencies together. Letters: N training rows, M rows to predict, P features.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from predictors.models.base import FloatArray, State
from predictors.models.covariance import Covariance, Matern, OrnsteinUhlenbeck
from predictors.models.gaussian_process import GaussianProcess

# Expected length of a state as a share of the whole time; its prior spans two decades around it.
_LENGTH = 0.03
_WALK = 1


class Drift:
    """Drift and features explained together by one Gaussian process; the drift is kept.

    What the features explain is a smooth function, the drift a rough walk along the order, so
    sudden changes of state are followed too. How much of each there is, and how long a state
    lasts, is found from the measurements.

    Args:
        seed: of the process.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, X: FloatArray, y: FloatArray, order: FloatArray) -> Self:
        """Fit to features (N, P), targets (N,) and positions or times of measurement (N,)."""
        self._begin, self._span = float(order.min()), float(np.ptp(order)) or 1.0
        num = X.shape[1]
        walk = OrnsteinUhlenbeck((num,), _LENGTH)
        terms: list[Covariance] = [Matern(tuple(range(num))), walk]
        self._process = GaussianProcess(terms, self.seed, along=num).fit(
            self._with_time(X, order), y
        )
        self.held_out = self._process.leave_one_out_part(_WALK)
        self.usual = float(np.median(self.held_out))
        return self

    def at(self, order: FloatArray) -> FloatArray:
        """Return the drift at positions (M,), to be added to what the features say."""
        features = np.zeros((len(order), self._process.X.shape[1] - 1))
        return self._process.part(_WALK, self._with_time(features, order))

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        own = {"seed": self.seed, "begin": self._begin, "span": self._span, "usual": self.usual}
        return {**own, "held_out": self.held_out, "process": self._process.state()}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild a fitted drift."""
        drift = cls(state["seed"])
        drift._begin, drift._span, drift.usual = state["begin"], state["span"], state["usual"]
        drift.held_out = state["held_out"]
        drift._process = GaussianProcess.from_state(state["process"])
        return drift

    def _with_time(self, X: FloatArray, order: FloatArray) -> FloatArray:
        return np.column_stack([X, (order - self._begin) / self._span])
