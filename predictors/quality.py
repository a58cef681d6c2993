"""Quality of architectures from few labels: a small ensemble that needs no settings.

Letters: N labels, M candidates, P given features, Q columns made of them, K models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from predictors.models.base import FloatArray, State
from predictors.models.columns import ColumnMap
from predictors.models.ensemble import RankEnsemble
from predictors.models.families import Families
from predictors.models.monotone import MonotoneMap
from predictors.models.saving import read_model, write_model
from searchspace.errors import UserError


class QualityRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Rank architectures by loss or accuracy from few labels.

    Takes any numeric matrix: encodings whose inactive genes are NaN ("not there"), totals over
    active layers, training-free metrics. Columns and target go through monotone maps that tame
    heavy tails; a prior-scaled ridge with products, a Gaussian process, a pairwise logistic
    ranking and, from 50 labels on, extremely randomised trees are then averaged with weights
    from cross-validation that stay near equal while labels are few. Rows with equal features
    are never split between folds.

    Args:
        prior_scale: expected effect of one unit of each feature, shape (P,), for encodings that
            know it; the features are then neither standardised nor multiplied with each other.
            None treats all features alike.
        groups: name of each feature's group, P of them; the evidence may scale a group as a
            whole. None makes two groups by how clearly a feature goes with the target.
        random_state: of folds and trees; an int for repeatable results.

    Source: Breiman, "Stacked regressions" (1996); the parts cite their own.
    """

    def __init__(
        self,
        prior_scale: ArrayLike | None = None,
        groups: Sequence[str] | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.prior_scale = prior_scale
        self.groups = groups
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> QualityRegressor:
        """Fit on labels.

        Args:
            X: features, shape (N, P); NaN means "not there".
            y: loss or accuracy, shape (N,), finite. One label, or equal ones, predict that value.

        Raises:
            ValueError: on wrong shapes, infinite features, or labels that are not finite.
        """
        features, labels = self._checked(X, y)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        standardise = self.prior_scale is None
        self.families_ = Families.of(features) if standardise else Families.none(features)
        self.columns_ = ColumnMap.of(self.families_.extend(features), standardise)
        self.column_scale_ = self._column_scale()
        self.target_ = MonotoneMap.of(labels)
        z = self.target_.forward(labels)
        Z = self._transform(features)
        self.bounds_ = (float(z.min() - 0.5 * np.ptp(z)), float(z.max() + 0.5 * np.ptp(z)))
        self.ensemble_: RankEnsemble | None = None
        if np.ptp(z) > 0 and Z.shape[1] > 0:
            self.ensemble_ = RankEnsemble(self._column_groups(), not standardise, seed).fit(Z, z)
        else:
            self.bounds_ = (float(z.mean()), float(z.mean()))
        return self

    def predict(
        self, X: ArrayLike, return_std: bool = False
    ) -> FloatArray | tuple[FloatArray, FloatArray]:
        """Return the prediction, shape (M,), in the target's unit.

        Args:
            X: features, shape (M, P).
            return_std: also return the standard deviation, shape (M,), noise of a label included.
        """
        check_is_fitted(self)
        features: FloatArray = validate_data(
            self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan"
        )
        mean, deviation = self._mapped(features)
        mean = np.clip(mean, *self.bounds_)
        value = self.target_.backward(mean)
        return (value, deviation * self.target_.slope(mean)) if return_std else value

    def save(self, path: str | Path) -> None:
        """Write the fitted model to a file that holds numbers only (nothing to unpickle)."""
        check_is_fitted(self)
        write_model(Path(path), "quality", self._state())

    @classmethod
    def load(cls, path: str | Path) -> QualityRegressor:
        """Return the model written by `save`; it predicts the same to the last bit.

        Raises:
            UserError: when the file is not a quality regressor.
        """
        state = read_model(Path(path), "quality")
        model = cls(state["prior_scale"], state["groups"], state["random_state"])
        model.n_features_in_ = int(state["num_features"])
        model.families_ = Families.from_state(state["families"])
        model.columns_ = ColumnMap.from_state(state["columns"])
        model.column_scale_ = state["column_scale"]
        model.target_ = MonotoneMap.from_state(state["target"])
        model.bounds_ = (float(state["bounds"][0]), float(state["bounds"][1]))
        ensemble = state["ensemble"]
        model.ensemble_ = None if ensemble is None else RankEnsemble.from_state(ensemble)
        return model

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _checked(self, X: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
        features, labels = validate_data(
            self, X, y, dtype=np.float64, ensure_all_finite="allow-nan", y_numeric=True
        )
        return features, np.asarray(labels, dtype=np.float64)

    def _transform(self, X: FloatArray) -> FloatArray:
        return self.columns_.transform(self.families_.extend(X)) * self.column_scale_

    def _column_scale(self) -> FloatArray:
        """Return the prior scale of each made column, shape (Q,)."""
        sources = self.columns_.sources
        if self.prior_scale is None:
            return np.asarray(self.families_.scale()[sources])
        scale = np.asarray(self.prior_scale, dtype=np.float64)
        if scale.shape != (self.n_features_in_,) or not (scale >= 0).all():
            raise UserError(
                f"prior_scale has shape {scale.shape} for {self.n_features_in_} features; "
                "give one non-negative number per feature"
            )
        return np.asarray(scale[sources])

    def _column_groups(self) -> list[str] | None:
        """Return the group of each made column, Q of them."""
        if self.groups is None:
            return None
        if len(self.groups) != self.n_features_in_:
            raise UserError(
                f"groups names {len(self.groups)} features of {self.n_features_in_}; "
                "give one name per feature"
            )
        names = [str(name) for name in self.groups]
        sources = self.columns_.sources
        return [names[j] if j < len(names) else "total over layers" for j in sources]

    def _mapped(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and deviation on the mapped scale, each of shape (M,)."""
        if self.ensemble_ is None:
            return np.full(len(X), self.bounds_[0]), np.zeros(len(X))
        return self.ensemble_.predict(self._transform(X))

    def _state(self) -> State:
        prior = None if self.prior_scale is None else np.asarray(self.prior_scale, dtype=float)
        plain_seed = isinstance(self.random_state, int)
        return {
            "prior_scale": prior,
            "groups": None if self.groups is None else [str(name) for name in self.groups],
            "random_state": self.random_state if plain_seed else None,
            "num_features": self.n_features_in_,
            "families": self.families_.state(),
            "columns": self.columns_.state(),
            "column_scale": self.column_scale_,
            "target": self.target_.state(),
            "bounds": list(self.bounds_),
            "ensemble": None if self.ensemble_ is None else self.ensemble_.state(),
        }
