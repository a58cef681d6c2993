"""Prediction intervals that cover as often as they say, from residuals of rows held out.

Letters: N training rows, M rows to predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from predictors.models.base import FloatArray, State


@dataclass(frozen=True)
class ConformalIntervals:
    """Cross-conformal intervals, scaled by the model's own standard deviation.

    Each side takes half of what may be missed, because latencies are skewed. Where there are
    too few rows for that, the interval is Student's.
    Source: Vovk, Cross-conformal predictors, 2015; normalised residuals: Papadopoulos, Gammerman
    and Vovk, Normalized nonconformity measures, 2008.

    Args:
        scores: residuals over standard deviations of rows held out, ascending, shape (N,).
    """

    scores: FloatArray

    @classmethod
    def of(cls, residual: FloatArray, std: FloatArray) -> Self:
        """Return the intervals that residuals (N,) with deviations (N,) ask for."""
        return cls(np.sort(residual / std))

    def around(
        self, mean: FloatArray, std: FloatArray, level: float
    ) -> tuple[FloatArray, FloatArray]:
        """Return lower and upper ends, (M,) each, that hold a new value with chance `level`."""
        num, missed = len(self.scores), (1.0 - level) / 2.0
        rank = int(np.floor(missed * (num + 1)))
        if rank >= 1:
            low, high = self.scores[rank - 1], self.scores[num - rank]
        else:
            high = self._student(missed)
            low = -high
        return mean + min(low, 0.0) * std, mean + max(high, 0.0) * std

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        return {"scores": self.scores}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild the intervals."""
        return cls(state["scores"])

    def _student(self, missed: float) -> float:
        from scipy.stats import t

        num = len(self.scores)
        spread = float(np.sqrt(np.mean(self.scores**2)))
        return (
            float(t.ppf(1.0 - missed, max(num - 1, 1))) * spread * float(np.sqrt(1.0 + 1.0 / num))
        )
