"""Quality of a candidate from few labels: Bayesian ridge whose prior knows the features' scales.

The model is linear in prior-scaled columns, so it is also a Gaussian process with the kernel
sum_g s_g^2 X_g X_g^T; the scales s_g of the groups and the noise are set by the evidence. With
plenty of labels a random-feature RBF term competes with the plain ridge by leave-one-out error.
Letters: N labels, M candidates, P columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchspace.errors import UserError

FloatArray = NDArray[np.float64]

_NOISE_GRID = np.geomspace(1e-5, 3.0, 16)
_STACK_FROM = 64
_CHUNK = 4096
_MAX_TUNING_ROWS = 192
_RBF_FEATURES = 192


class QualityRegressor:
    """Predict mean and standard deviation of a target from prior-scaled features.

    Args:
        prior_scale: expected effect of each column, shape (P,); None means all equal.
        groups: name of each column's group; the evidence may scale a group up or down as a
            whole. None means one group.
        seed: of the random features and of nothing else.

    Source: MacKay, "Bayesian interpolation" (1992); Rahimi and Recht (2007) for the RBF term.
    """

    def __init__(
        self,
        prior_scale: ArrayLike | None = None,
        groups: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self._prior = None if prior_scale is None else np.asarray(prior_scale, dtype=np.float64)
        self._groups = None if groups is None else np.asarray(groups)
        self._seed = seed
        self._multipliers: dict[str, float] = {}

    def fit(self, X: ArrayLike, y: ArrayLike) -> QualityRegressor:
        """Fit on labels; rows whose label is NaN or infinite are left out.

        Args:
            X: features, shape (N, P).
            y: targets, shape (N,).

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
        self._warp = _choose_warp(target)
        z = self._warp.forward(target)
        self._centre, self._spread = float(z.mean()), float(z.std()) or 1.0
        z = (z - self._centre) / self._spread
        prior = np.ones(features.shape[1]) if self._prior is None else self._prior
        self._mean_x = features.mean(axis=0)
        centred = features - self._mean_x
        self._scale = prior * self._group_multipliers(centred * prior, z)
        self._rbf: _RandomFeatures | None = None
        self._posterior = _Posterior.of(centred * self._scale, z)
        if len(z) >= _STACK_FROM:
            self._try_rbf(centred * self._scale, z)
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
        """Return the mean alone, shape (M,); cheaper than `predict`."""
        return self._unwarp(self._project(X, self._posterior.weights[None]))[:, 0]

    def draw(self, rng: np.random.Generator, num_draws: int) -> FloatArray:
        """Return weights of posterior draws, shape (num_draws, P'), for `predict_draws`."""
        return self._posterior.draw(rng, num_draws)

    def predict_draws(self, X: ArrayLike, draws: FloatArray) -> FloatArray:
        """Return the mean and what each draw predicts, shape (M, 1 + num_draws), mean first."""
        return self._unwarp(self._project(X, np.vstack([self._posterior.weights, draws])))

    @property
    def noise_std(self) -> float:
        """Estimated noise of one label, in the target's unit near its mean."""
        std = np.array([self._posterior.noise_std])
        return float(self._unwarp_std(np.zeros(1), std)[0])

    def _project(self, X: ArrayLike, weights: FloatArray) -> FloatArray:
        """Return phi(X) @ weights.T; without the RBF term the scaling folds into the weights."""
        features = np.asarray(X)
        if self._rbf is not None:
            blocks = range(0, len(features), _CHUNK)
            parts = [self._phi(features[b : b + _CHUNK]) @ weights.T for b in blocks]
            return np.concatenate([np.empty((0, len(weights))), *parts])
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

    def _group_multipliers(self, phi: FloatArray, z: FloatArray) -> FloatArray:
        """Scale whole groups up or down where the evidence says so (coordinate ascent)."""
        if self._groups is None or len(z) < 12:
            return np.ones(phi.shape[1])
        if len(z) > _MAX_TUNING_ROWS:
            # The group scales need no more than this; the cubic cost would dominate otherwise.
            rows = np.random.default_rng(self._seed).permutation(len(z))[:_MAX_TUNING_ROWS]
            phi, z = phi[rows], z[rows]
        names = sorted({str(name) for name in self._groups})
        kernels = {name: _gram(phi[:, self._groups == name]) for name in names}
        log_scale = dict.fromkeys(names, 0.0)
        log_scale.update({k: v for k, v in self._multipliers.items() if k in log_scale})

        def score(scales: dict[str, float]) -> float:
            kernel = sum(np.exp(2 * scales[name]) * kernels[name] for name in names)
            penalty = sum(0.5 * (scales[name] / 1.1) ** 2 for name in names)
            return _best_evidence(np.asarray(kernel), z) - penalty

        best = score(log_scale)
        for step in (0.7, 0.35):
            for name in names:
                for sign in (step, -step):
                    trial = {**log_scale, name: log_scale[name] + sign}
                    value = score(trial)
                    if value > best:
                        best, log_scale = value, trial
                        break
        self._multipliers = log_scale
        return np.array([np.exp(log_scale[name]) for name in self._groups])

    def _try_rbf(self, phi: FloatArray, z: FloatArray) -> None:
        plain = self._posterior
        for relative_length in (0.7, 1.5):
            for amplitude in (0.3, 1.0):
                rbf = _RandomFeatures.of_scale(phi, relative_length, amplitude, self._seed)
                posterior = _Posterior.of(np.hstack([phi, rbf.of(phi)]), z)
                if posterior.leave_one_out < 0.97 * min(
                    plain.leave_one_out, self._posterior.leave_one_out
                ):
                    self._posterior, self._rbf = posterior, rbf


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


def _choose_warp(y: FloatArray) -> _Warp:
    """Log when it makes a positive target clearly less skewed; clip far outliers above."""
    log = False
    if len(y) >= 8 and y.min() > 0 and y.max() > 1.5 * y.min():
        log = abs(_skew(np.log(y))) < 0.8 * abs(_skew(y))
    z = np.log(y) if log else y
    low, middle, high = np.quantile(z, [0.25, 0.5, 0.75])
    width = max(high - low, 0.25 * (middle - z.min()))
    upper = high + 5.0 * width if width > 0 else np.inf
    return _Warp(log, float(np.exp(min(upper, 700.0)) if log else upper))


def _skew(y: FloatArray) -> float:
    spread = float(y.std())
    return float((((y - y.mean()) / spread) ** 3).mean()) if spread > 0 else 0.0


def _gram(phi: FloatArray) -> FloatArray:
    return np.asarray(phi @ phi.T)


def _evidence(values: FloatArray, projected: FloatArray) -> FloatArray:
    """Log evidence per noise level, with the signal variance profiled out."""
    total = values[None, :] + _NOISE_GRID[:, None] * max(float(values.mean()), 1e-12)
    n = len(values)
    variance = (projected**2 / total).sum(axis=1) / n
    return np.asarray(-0.5 * (n * np.log(np.maximum(variance, 1e-300)) + np.log(total).sum(axis=1)))


def _best_evidence(kernel: FloatArray, z: FloatArray) -> float:
    values, vectors = np.linalg.eigh(kernel)
    return float(_evidence(np.maximum(values, 0.0), vectors.T @ z).max())


@dataclass(frozen=True)
class _Posterior:
    """Gaussian posterior of ridge weights under w ~ N(0, variance), noise = ridge * variance."""

    phi: FloatArray
    weights: FloatArray
    vectors: FloatArray
    values: FloatArray
    ridge: float
    variance: float
    leave_one_out: float

    @staticmethod
    def of(phi: FloatArray, z: FloatArray) -> _Posterior:
        values, vectors = np.linalg.eigh(_gram(phi))
        values = np.maximum(values, 0.0)
        projected = vectors.T @ z
        best = int(np.argmax(_evidence(values, projected)))
        ridge = float(_NOISE_GRID[best]) * max(float(values.mean()), 1e-12)
        dual = vectors @ (projected / (values + ridge))
        # Leave-one-out residuals of kernel ridge in closed form (Rasmussen and Williams, 5.12).
        diagonal = ((vectors**2) / (values + ridge)).sum(axis=1)
        loo = float(np.sqrt(np.mean((dual / diagonal) ** 2)))
        variance = max(float(z @ dual) / len(z), 1e-12)
        return _Posterior(phi, phi.T @ dual, vectors, values, ridge, variance, loo)

    @property
    def noise_std(self) -> float:
        return float(np.sqrt(self.ridge * self.variance))

    def std(self, phi: FloatArray) -> FloatArray:
        whitened = self.phi.T @ (self.vectors / np.sqrt(self.values + self.ridge))
        explained = ((phi @ whitened) ** 2).sum(axis=1)
        left = np.maximum((phi**2).sum(axis=1) - explained, 0.0)
        return np.asarray(np.sqrt(self.variance * left))

    def draw(self, rng: np.random.Generator, num_draws: int) -> FloatArray:
        """Exact draws by Matheron's rule: a prior draw, corrected by its own residuals."""
        prior = rng.standard_normal((num_draws, self.phi.shape[1]))
        noise = rng.standard_normal((num_draws, self.phi.shape[0])) * np.sqrt(self.ridge)
        residual = prior @ self.phi.T + noise
        dual = (residual @ self.vectors / (self.values + self.ridge)) @ self.vectors.T
        return np.asarray(self.weights + np.sqrt(self.variance) * (prior - dual @ self.phi))


@dataclass(frozen=True)
class _RandomFeatures:
    """Random Fourier features of an RBF kernel on the prior-scaled columns."""

    frequencies: FloatArray
    phases: FloatArray
    amplitude: float

    @staticmethod
    def of_scale(
        phi: FloatArray, relative_length: float, amplitude: float, seed: int
    ) -> _RandomFeatures:
        rng = np.random.default_rng(seed)
        squared = float((phi**2).sum(axis=1).mean()) or 1.0
        length = relative_length * np.sqrt(2.0 * squared)
        frequencies = rng.standard_normal((phi.shape[1], _RBF_FEATURES)) / length
        phases = rng.uniform(0.0, 2.0 * np.pi, _RBF_FEATURES)
        size = amplitude * np.sqrt(squared) * np.sqrt(2.0 / _RBF_FEATURES)
        return _RandomFeatures(frequencies, phases, float(size))

    def of(self, phi: FloatArray) -> FloatArray:
        return np.asarray(self.amplitude * np.cos(phi @ self.frequencies + self.phases))
