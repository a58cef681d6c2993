"""Quality of a candidate from few labels: Bayesian ridge whose prior knows the features' scales.

The model is linear in prior-scaled columns, so it is also a Gaussian process with the kernel
sum_g s_g^2 X_g X_g^T; the scales s_g of the groups and the noise are set by the evidence. With
plenty of labels a random-feature RBF term competes with the plain ridge by leave-one-out error.
Letters: N labels, M candidates, P columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from predictors.encodings.lazy import LazyFeatures
from predictors.models.base import FloatArray, State
from predictors.models.posterior import Posterior, RandomFeatures, best_evidence, gram
from searchspace.errors import UserError

_TUNE_FROM = 5
_STACK_FROM = 64
_CHUNK = 4096
_MAX_TUNING_ROWS = 192
_RbfOptions = tuple[tuple[float, float], ...]
_RBF_OPTIONS: _RbfOptions = ((0.7, 0.3), (0.7, 1.0), (1.5, 0.3), (1.5, 1.0))
"""Length scale and amplitude of the random-feature term, relative to the linear one."""


class PriorRidge:
    """Predict mean and standard deviation of a target from prior-scaled features.

    Args:
        prior_scale: expected effect of each column, shape (P,); None means all equal.
        groups: name of each column's group; the evidence may scale a group up or down as a
            whole. None means one group.
        seed: of the random features and of nothing else.
        bends: whether the random-feature term is tried.

    Source: MacKay, "Bayesian interpolation" (1992); Rahimi and Recht (2007) for the RBF term.
    """

    def __init__(
        self,
        prior_scale: ArrayLike | None = None,
        groups: Sequence[str] | None = None,
        seed: int = 0,
        bends: bool = True,
    ) -> None:
        self._prior = None if prior_scale is None else np.asarray(prior_scale, dtype=np.float64)
        self._groups = None if groups is None else np.asarray(groups)
        self._seed, self._bends = seed, bends
        self._log_multipliers: dict[bool, dict[str, float]] = {}
        self._rbf_options: _RbfOptions = ()

    def fit(self, X: ArrayLike, y: ArrayLike, tune: bool = True) -> PriorRidge:
        """Fit on labels; rows whose label is NaN or infinite are left out.

        Args:
            X: features, shape (N, P).
            y: targets, shape (N,).
            tune: False keeps what the last fit chose (log, scales of groups, random features) and
                fits the weights alone, many times as fast: for a few more of the same labels.

        Raises:
            UserError: if no finite label is left or shapes disagree.
        """
        features, target = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
        keep = np.isfinite(target)
        if len(features) != len(target) or not keep.any():
            raise UserError(
                f"quality regressor got {len(features)} rows and {int(keep.sum())} finite labels; "
                "give one finite label per row"
            )
        features, target = features[keep], target[keep]
        prior = np.ones(features.shape[1]) if self._prior is None else self._prior
        self._mean_x = features.mean(axis=0)
        centred = features - self._mean_x
        if tune:
            # The group scales need no more rows; the cubic cost would dominate otherwise.
            rows = np.random.default_rng(self._seed).permutation(len(target))[:_MAX_TUNING_ROWS]
            self._warp = self._choose_warp((centred * prior)[rows], target[rows])
        z = self._warp.forward(target)
        self._centre, self._spread = float(z.mean()), float(z.std()) or 1.0
        z = (z - self._centre) / self._spread
        self._scale = prior * self._multipliers_of(self._warp, prior)
        phi = centred * self._scale
        self._rbf: RandomFeatures | None = None
        if not tune and self._rbf_options:
            rbf = RandomFeatures.of_scale(phi, *self._rbf_options[0], self._seed)
            self._rbf, self._posterior = rbf, Posterior.of(np.hstack([phi, rbf.of(phi)]), z)
            return self
        self._posterior = Posterior.of(phi, z)
        if tune and self._bends and len(z) >= _STACK_FROM:
            self._try_rbf(phi, z)
        return self

    def predict(self, X: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation, both of shape (M,), in the target's unit."""
        features = np.asarray(X)
        means, stds = [], []
        for start in range(0, len(features), _CHUNK):
            phi = self._phi(features[start : start + _CHUNK])
            means.append(phi @ self._posterior.weights)
            stds.append(self._posterior.std(phi))
        mean, std = np.concatenate([[], *means]), np.concatenate([[], *stds])
        return self._unwarp(mean), self._unwarp_std(mean, std)

    def predict_mean(self, X: ArrayLike) -> FloatArray:
        """Return the mean alone, shape (M,); cheaper than `predict`.

        Cheapest with `predictors.encodings.LazyFeatures`: a million candidates in about a second.
        """
        return self._unwarp(self._project(X, self._posterior.weights[None]))[:, 0]

    def draw(self, rng: np.random.Generator, num_draws: int) -> FloatArray:
        """Return weights of posterior draws, shape (num_draws, P'), for `predict_draws`."""
        return self._posterior.draw(rng, num_draws)

    def predict_draws(self, X: ArrayLike, draws: FloatArray) -> FloatArray:
        """Return the mean and what each draw predicts, shape (M, 1 + num_draws), mean first."""
        return self._unwarp(self._project(X, np.vstack([self._posterior.weights, draws])))

    def state(self) -> dict[str, Any]:
        """Return what `predict` needs."""
        return {
            "warp": asdict(self._warp),
            "centre": self._centre,
            "spread": self._spread,
            "mean_x": self._mean_x,
            "scale": self._scale,
            "rbf": None if self._rbf is None else vars(self._rbf),
            "posterior": vars(self._posterior),
        }

    @classmethod
    def from_state(cls, state: State) -> PriorRidge:
        """Rebuild a fitted model; it predicts, but remembers no prior to be fitted again."""
        model = cls()
        model._warp = _Warp(**state["warp"])
        model._centre, model._spread = state["centre"], state["spread"]
        model._mean_x, model._scale = state["mean_x"], state["scale"]
        model._rbf = None if state["rbf"] is None else RandomFeatures(**state["rbf"])
        model._posterior = Posterior(**state["posterior"])
        return model

    @property
    def noise_std(self) -> float:
        """Estimated noise of one label, in the target's unit near its mean."""
        std = np.array([self._posterior.noise_std])
        return float(self._unwarp_std(np.zeros(1), std)[0])

    def _project(self, X: ArrayLike, weights: FloatArray) -> FloatArray:
        """Return phi(X) @ weights.T; without the RBF term the scaling folds into the weights."""
        features = X if isinstance(X, LazyFeatures) else np.asarray(X)
        if self._rbf is None:
            return self._linear(features, weights)
        blocks = [features[b : b + _CHUNK] for b in range(0, len(features), _CHUNK)]
        parts = [self._project_rbf(block, weights, self._rbf) for block in blocks]
        return np.concatenate([np.empty((0, len(weights))), *parts])

    def _project_rbf(self, features: Any, weights: FloatArray, rbf: RandomFeatures) -> FloatArray:
        num_plain = len(self._scale)
        everything = np.vstack([weights[:, :num_plain], rbf.frequencies.T])
        linear, angle = np.split(self._linear(features, everything), [len(weights)], axis=1)
        # The cosine of an angle needs no more digits than these, and takes half the time.
        bent = rbf.of_angle(angle.astype(np.float32))
        return np.asarray(linear + bent @ weights[:, num_plain:].T.astype(np.float32))

    def _linear(self, features: Any, weights: FloatArray) -> FloatArray:
        """Return the scaled features @ weights.T."""
        scaled = (weights * self._scale).T
        folded = features @ scaled.astype(features.dtype, copy=False)
        return np.asarray(folded - self._mean_x @ scaled, dtype=np.float64)

    def _phi(self, X: ArrayLike) -> FloatArray:
        scaled = (np.asarray(X, dtype=np.float64) - self._mean_x) * self._scale
        return scaled if self._rbf is None else np.hstack([scaled, self._rbf.of(scaled)])

    def _unwarp(self, z: FloatArray) -> FloatArray:
        return self._warp.backward(z * self._spread + self._centre)

    def _unwarp_std(self, z: FloatArray, std: FloatArray) -> FloatArray:
        slope = self._warp.slope(z * self._spread + self._centre)
        return np.asarray(std * self._spread * slope)

    def _choose_warp(self, phi: FloatArray, y: FloatArray) -> _Warp:
        """Return the warp with the highest evidence, the groups being scaled as suits each."""
        evidence = {}
        for warp in _possible_warps(y):
            z = warp.forward(y)
            spread = float(z.std()) or 1.0
            found = self._tune_groups(warp, phi, (z - z.mean()) / spread)
            # Of the labels in their own unit, so that warps can be compared.
            evidence[warp] = found - len(z) * np.log(spread) - (z.sum() if warp.log else 0.0)
        return max(evidence, key=lambda warp: evidence[warp])

    def _multipliers_of(self, warp: _Warp, prior: FloatArray) -> FloatArray:
        if self._groups is None:
            return np.ones_like(prior)
        logs = self._log_multipliers.get(warp.log, {})
        return np.exp([logs.get(str(name), 0.0) for name in self._groups])

    def _tune_groups(self, warp: _Warp, phi: FloatArray, z: FloatArray) -> float:
        """Scale whole groups up or down where the evidence says so; return what it says then."""
        if self._groups is None or len(z) < _TUNE_FROM:
            return best_evidence(gram(phi), z)
        names = sorted({str(name) for name in self._groups})
        kernels = {name: gram(phi[:, self._groups == name]) for name in names}
        log_scale = dict.fromkeys(names, 0.0)
        log_scale.update(self._log_multipliers.get(warp.log, {}))

        def score(scales: dict[str, float]) -> float:
            kernel = sum(np.exp(2 * scales[name]) * kernels[name] for name in names)
            penalty = sum(0.5 * (scales[name] / 1.1) ** 2 for name in names)
            return best_evidence(np.asarray(kernel), z) - penalty

        best = score(log_scale)
        for step in (0.7, 0.35):
            for name in names:
                for sign in (step, -step):
                    trial = {**log_scale, name: log_scale[name] + sign}
                    value = score(trial)
                    if value > best:
                        best, log_scale = value, trial
                        break
        self._log_multipliers[warp.log] = log_scale
        return best

    def _try_rbf(self, phi: FloatArray, z: FloatArray) -> None:
        """Take the random features that predict left-out labels clearly better, if any do."""
        plain = self._posterior
        self._rbf_options = ()
        for relative_length, amplitude in _RBF_OPTIONS:
            rbf = RandomFeatures.of_scale(phi, relative_length, amplitude, self._seed)
            posterior = Posterior.of(np.hstack([phi, rbf.of(phi)]), z)
            if posterior.leave_one_out < 0.97 * min(
                plain.leave_one_out, self._posterior.leave_one_out
            ):
                self._posterior, self._rbf = posterior, rbf
                self._rbf_options = ((relative_length, amplitude),)


@dataclass(frozen=True)
class _Warp:
    """Optional log of a positive target, clipped so that a collapsed run cannot dominate."""

    log: bool
    upper: float

    def forward(self, y: FloatArray) -> FloatArray:
        clipped = np.minimum(y, self.upper)
        return np.log(clipped) if self.log else clipped

    def backward(self, z: FloatArray) -> FloatArray:
        return np.exp(np.clip(z, -700.0, 700.0)) if self.log else z

    def slope(self, z: FloatArray) -> FloatArray:
        return self.backward(z) if self.log else np.ones_like(z)


def _possible_warps(y: FloatArray) -> list[_Warp]:
    """As they are, and their log where that is possible and bends; far outliers are clipped."""
    warps = [_Warp(False, _outlier_limit(y))]
    if len(y) >= 8 and y.min() > 0 and y.max() > 1.5 * y.min():
        warps.append(_Warp(True, float(np.exp(min(_outlier_limit(np.log(y)), 700.0)))))
    return warps


def _outlier_limit(z: FloatArray) -> float:
    low, middle, high = np.quantile(z, [0.25, 0.5, 0.75])
    width = max(high - low, 0.25 * (middle - z.min()))
    return float(high + 5.0 * width) if width > 0 else float(np.inf)
