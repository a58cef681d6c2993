"""Predicted objectives of level matrices: exact where the codec knows them, regressors elsewhere.

Letters: N candidates, G genes, D posterior draws, M objectives (minimised).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nas.samplers._codec import Codec, IntMatrix, LastCosts
from predictors.encodings import GeneEncoding
from predictors.models.prior_ridge import PriorRidge

FloatArray = NDArray[np.float64]

_TUNE_ALWAYS, _TUNE_GROWTH = 64, 1.1
"""Below so many labels every fit chooses scales anew; then only after so much growth."""


class Surrogate:
    """Regressors for the objectives that cost an evaluation and for measured constraints.

    Args:
        codec: the space with its exact objectives.
        encoding: features with prior scales.
        costs: the codec's exact objectives.
        signs: +1 per minimised objective, -1 per maximised one, shape (M,).
    """

    def __init__(
        self, codec: Codec, encoding: GeneEncoding, costs: LastCosts, signs: FloatArray
    ) -> None:
        self.codec = codec
        self.encoding = encoding
        self.signs = signs
        self._costs = costs
        self._exact = list(codec.exact_indices)
        self._predicted = [m for m in range(len(signs)) if m not in self._exact]
        self._regressors = {m: self._new_regressor() for m in self._predicted}
        self._tuned_on = 0
        self._limits: list[PriorRidge] = []
        self._draws: dict[int, FloatArray] = {}

    def fit(
        self,
        levels: IntMatrix,
        objectives: FloatArray,
        measured_constraints: FloatArray,
        rng: np.random.Generator,
        num_draws: int,
    ) -> None:
        """Refit on everything evaluated.

        Args:
            levels: shape (N, G).
            objectives: minimised values as told, shape (N, M).
            measured_constraints: values as told, shape (N, k), NaN where not told.
            rng: generator of the posterior draws.
            num_draws: how many functions D to draw.
        """
        features = self.encoding.encode(levels)
        tune = len(levels) < _TUNE_ALWAYS or len(levels) >= _TUNE_GROWTH * self._tuned_on
        self._tuned_on = len(levels) if tune else self._tuned_on
        for m, regressor in self._regressors.items():
            regressor.fit(features, objectives[:, m], tune=tune)
            self._draws[m] = regressor.draw(rng, num_draws)
        self._limits = []
        for column in measured_constraints.T:
            if (column > 0).any() and np.isfinite(column).sum() >= 4:
                self._limits.append(self._new_regressor().fit(features, column))

    def exact(self, levels: IntMatrix, objectives: FloatArray) -> FloatArray:
        """Replace told values of exact objectives by the codec's, so that all compare alike."""
        fixed = objectives.copy()
        if self._exact and len(levels):
            fixed[:, self._exact] = self._exact_minimised(levels)
        return fixed

    @property
    def num_draws(self) -> int:
        """Number of functions D drawn at the last fit."""
        return next((len(draws) for draws in self._draws.values()), 0)

    def predict(self, levels: IntMatrix) -> FloatArray:
        """Return predictions, shape (1 + D, N, M): the mean, then the draws."""
        out = np.empty((1 + self.num_draws, len(levels), len(self.signs)))
        if self._exact:
            out[:, :, self._exact] = self._exact_minimised(levels)
        if self._predicted:
            features = self.encoding.encode(levels)
            for m in self._predicted:
                out[:, :, m] = self._regressors[m].predict_draws(features, self._draws[m]).T
        return out

    def violation(self, levels: IntMatrix) -> FloatArray:
        """Return how far each candidate is outside its limits, shape (N,); 0 means feasible.

        Exact constraints count fully; learned ones only where the model is fairly sure.
        """
        total = self.codec_violation(levels)
        if self._limits:
            features = self.encoding.encode(levels)
            for limit in self._limits:
                mean, std = limit.predict(features)
                total = total + np.maximum(mean - 0.25 * std, 0.0)
        return np.asarray(total, dtype=np.float64)

    def codec_violation(self, levels: IntMatrix) -> FloatArray:
        """Return how far each candidate is outside the exact constraints alone, shape (N,)."""
        exact = self.codec.constraints(levels)
        return np.asarray(np.where(np.isnan(exact), np.inf, np.maximum(exact, 0.0)).sum(axis=1))

    def _exact_minimised(self, levels: IntMatrix) -> FloatArray:
        return np.asarray(self._costs(levels) * self.signs[self._exact])

    def _new_regressor(self) -> PriorRidge:
        groups: Sequence[str] = self.encoding.groups
        return PriorRidge(self.encoding.prior_scale, groups)
