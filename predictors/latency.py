"""Latency of architectures from few measurements.

Letters: N measurements, M architectures to predict, P features, S other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from predictors._latency_candidates import latency_candidates
from predictors._latency_design import LatencyDesign
from predictors._latency_sources import Source, source_values
from predictors.models.base import FloatArray, State
from predictors.models.conformal import ConformalIntervals
from predictors.models.drift import Drift
from predictors.models.saving import read_model, write_model
from predictors.models.stacking import Stack, median_shift
from searchspace.errors import UserError

Intervals = tuple[FloatArray, FloatArray]


class LatencyRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Predict latency from features, with relative error as the loss.

    Works on the logarithm of positive targets (on other targets as they are), with noise that
    has heavy tails. Gaussian processes on sizes and on their logarithms, a ridge on products
    and, from 100 rows on, boosted trees with absolute loss are averaged with weights from
    cross-validation. If the order of measurement is known, the device's slow drift is taken out
    before and, for architectures whose place in the order is known, added again. Regressors of
    other devices, when given, are features of this one.

    Args:
        random_state: of folds and trees; an int or None for repeatable results.
    """

    def __init__(self, random_state: int | np.random.RandomState | None = 0) -> None:
        self.random_state = random_state

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        order: ArrayLike | None = None,
        sources: Sequence[Source] = (),
    ) -> LatencyRegressor:
        """Fit on measurements.

        Args:
            X: features, shape (N, P); NaN means "not there".
            y: latencies in any unit, shape (N,), finite. One, or equal ones, predict that value.
            order: position or time of each measurement, shape (N,), when it is known.
            sources: fitted regressors of other devices on the same features. With them 20
                measurements do what takes 100 without.

        Raises:
            ValueError: on wrong shapes, infinite features, or targets that are not finite.
        """
        features, targets = validate_data(
            self, X, y, dtype=np.float64, ensure_all_finite="allow-nan", y_numeric=True
        )
        targets = np.asarray(targets, dtype=np.float64)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.sources_ = list(sources)
        self.logarithmic_ = bool((targets > 0).all())
        z = np.log(targets) if self.logarithmic_ else targets
        self.constant_: float | None = None
        self.drift_: Drift | None = None
        others = source_values(self.sources_, features)
        self.design_ = LatencyDesign.of(features, z, others)
        Z = self.design_.transform(features, others)
        places = None if order is None else _places(order, len(z))
        if np.ptp(z) == 0 or len(self.design_.raw) == 0 or len(z) < 3:
            self.constant_ = float(np.median(z))
            return self
        self._fit_models(Z, z, places, seed)
        return self

    @overload
    def predict(
        self,
        X: ArrayLike,
        return_interval: Literal[False] = False,
        order: ArrayLike | None = None,
        level: float = 0.9,
    ) -> FloatArray: ...

    @overload
    def predict(
        self,
        X: ArrayLike,
        return_interval: Literal[True],
        order: ArrayLike | None = None,
        level: float = 0.9,
    ) -> tuple[FloatArray, Intervals]: ...

    def predict(
        self,
        X: ArrayLike,
        return_interval: bool = False,
        order: ArrayLike | None = None,
        level: float = 0.9,
    ) -> FloatArray | tuple[FloatArray, Intervals]:
        """Return latencies in the unit of the targets, shape (M,).

        Args:
            X: features, shape (M, P).
            return_interval: also return the lower and upper ends (M,) of intervals that hold a
                new measurement with chance `level`.
            order: position or time of each measurement that is predicted, shape (M,), on the
                scale of `fit`; without it the device's usual state is assumed.
            level: share of new measurements that intervals hold, between 0 and 1.

        Raises:
            ValueError: on wrong shapes, infinite features, a level outside 0 to 1, or an order
                where `fit` had none.
        """
        check_is_fitted(self)
        features = validate_data(
            self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan"
        )
        if not 0 < level < 1:
            raise UserError(f"level={level} is not between 0 and 1; give 0.9 for 90% intervals")
        places = None if order is None else _places(order, len(features))
        if places is not None and self.drift_ is None and self.constant_ is None:
            raise UserError("order was given to predict but not to fit; give it to both or neither")
        mean, std, intervals = self._explained(features, places)
        if not return_interval:
            return self._latency(mean)
        low, high = (mean, mean) if intervals is None else intervals.around(mean, std, level)
        return self._latency(mean), (self._latency(low), self._latency(high))

    def save(self, path: str | Path) -> None:
        """Write the fitted model to a file that holds numbers only (nothing to unpickle).

        Raises:
            UserError: when the file cannot be written, or a source is not a `LatencyRegressor`.
        """
        check_is_fitted(self)
        write_model(path, "latency", self._state())

    @classmethod
    def load(cls, path: str | Path) -> LatencyRegressor:
        """Return the model written by `save`; it predicts the same to the last bit.

        Raises:
            UserError: when the file is not a latency regressor.
        """
        state = read_model(path, "latency")
        try:
            return cls._from_state(state)
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{path} is damaged: its parts do not fit; save it again") from None

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _fit_models(
        self, Z: FloatArray, z: FloatArray, places: FloatArray | None, seed: int
    ) -> None:
        steady = z
        if places is not None:
            self.drift_ = Drift(seed).fit(Z[:, self.design_.raw], z, places)
            # Each row's drift comes from the other rows, so its own noise is not taken for it.
            steady = z - self.drift_.held_out
        candidates = latency_candidates(self.design_, len(z), seed)
        self.stack_ = Stack(seed).fit(candidates, Z, steady)
        mean, std = self.stack_.held_out
        self.offset_ = median_shift(steady - mean, self.logarithmic_)
        self.intervals_ = ConformalIntervals.of(steady - mean - self.offset_, std)
        self.intervals_without_order_ = self.intervals_
        if self.drift_ is not None:
            residual = z - mean - self.offset_ - self.drift_.usual
            self.intervals_without_order_ = ConformalIntervals.of(residual, std)

    def _explained(
        self, X: FloatArray, places: FloatArray | None
    ) -> tuple[FloatArray, FloatArray, ConformalIntervals | None]:
        """Return mean and deviation (M,) on the target's inner scale, and their intervals."""
        if self.constant_ is not None:
            return np.full(len(X), self.constant_), np.zeros(len(X)), None
        mean, std = self.stack_.predict(self.design_.transform(X, source_values(self.sources_, X)))
        mean = mean + self.offset_
        if self.drift_ is None:
            return mean, std, self.intervals_
        if places is None:
            return mean + self.drift_.usual, std, self.intervals_without_order_
        return mean + self.drift_.at(places), std, self.intervals_

    def _latency(self, z: FloatArray) -> FloatArray:
        return np.asarray(np.exp(z) if self.logarithmic_ else z)

    def _state(self) -> State:
        sources = []
        for number, source in enumerate(self.sources_):
            if not isinstance(source, LatencyRegressor):
                raise UserError(
                    f"sources[{number}] is a {type(source).__name__}; only LatencyRegressor "
                    "sources can be saved"
                )
            sources.append(source._state())
        state: dict[str, Any] = {
            "random_state": self.random_state if isinstance(self.random_state, int) else None,
            "num_features": self.n_features_in_,
            "logarithmic": self.logarithmic_,
            "constant": self.constant_,
            "sources": sources,
            "design": self.design_.state(),
        }
        if self.constant_ is None:
            state["stack"] = self.stack_.state()
            state["offset"] = self.offset_
            state["drift"] = None if self.drift_ is None else self.drift_.state()
            state["intervals"] = self.intervals_.state()
            state["intervals_without_order"] = self.intervals_without_order_.state()
        return state

    @classmethod
    def _from_state(cls, state: State) -> LatencyRegressor:
        model = cls(state["random_state"])
        model.n_features_in_ = int(state["num_features"])
        model.logarithmic_, model.constant_ = state["logarithmic"], state["constant"]
        model.sources_ = [cls._from_state(source) for source in state["sources"]]
        model.design_, model.drift_ = LatencyDesign.from_state(state["design"]), None
        if model.constant_ is None:
            model.stack_ = Stack.from_state(state["stack"])
            model.offset_ = state["offset"]
            drift = state["drift"]
            model.drift_ = None if drift is None else Drift.from_state(drift)
            model.intervals_ = ConformalIntervals.from_state(state["intervals"])
            without = state["intervals_without_order"]
            model.intervals_without_order_ = ConformalIntervals.from_state(without)
        return model


def _places(order: ArrayLike, num_rows: int) -> FloatArray:
    places = np.asarray(order, dtype=np.float64)
    if places.shape != (num_rows,) or not np.isfinite(places).all():
        raise UserError(
            f"order has shape {places.shape} with finite={bool(np.isfinite(places).all())}; give "
            f"one finite position or time per row, shape ({num_rows},)"
        )
    return places
