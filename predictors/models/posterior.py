"""What a Bayesian ridge is made of: evidence, posterior of the weights, random features.

Letters: N labels, M candidates, P columns, F random features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.models.base import FloatArray

_NOISE_GRID = np.geomspace(1e-5, 3.0, 16)
_RBF_FEATURES = 192


def gram(phi: FloatArray) -> FloatArray:
    """Return the inner products of the rows, shape (N, N)."""
    return np.asarray(phi @ phi.T)


def _evidence(values: FloatArray, projected: FloatArray) -> FloatArray:
    """Log evidence per noise level, with the signal variance profiled out."""
    total = values[None, :] + _NOISE_GRID[:, None] * max(float(values.mean()), 1e-12)
    n = len(values)
    variance = (projected**2 / total).sum(axis=1) / n
    return np.asarray(-0.5 * (n * np.log(np.maximum(variance, 1e-300)) + np.log(total).sum(axis=1)))


def best_evidence(kernel: FloatArray, z: FloatArray) -> float:
    """Return the log evidence of the kernel at its best noise level."""
    values, vectors = np.linalg.eigh(kernel)
    return float(_evidence(np.maximum(values, 0.0), vectors.T @ z).max())


@dataclass(frozen=True)
class Posterior:
    """Gaussian posterior of ridge weights under w ~ N(0, variance), noise = ridge * variance."""

    phi: FloatArray
    weights: FloatArray
    vectors: FloatArray
    values: FloatArray
    ridge: float
    variance: float
    leave_one_out: float

    @staticmethod
    def of(phi: FloatArray, z: FloatArray) -> Posterior:
        """Fit to scaled features (N, P) and centred targets (N,), the noise by the evidence."""
        values, vectors = np.linalg.eigh(gram(phi))
        values = np.maximum(values, 0.0)
        projected = vectors.T @ z
        best = int(np.argmax(_evidence(values, projected)))
        ridge = float(_NOISE_GRID[best]) * max(float(values.mean()), 1e-12)
        dual = vectors @ (projected / (values + ridge))
        # Leave-one-out residuals of kernel ridge in closed form (Rasmussen and Williams, 5.12).
        diagonal = ((vectors**2) / (values + ridge)).sum(axis=1)
        loo = float(np.sqrt(np.mean((dual / diagonal) ** 2)))
        variance = max(float(z @ dual) / len(z), 1e-12)
        return Posterior(phi, phi.T @ dual, vectors, values, ridge, variance, loo)

    @property
    def noise_std(self) -> float:
        """Noise of one label."""
        return float(np.sqrt(self.ridge * self.variance))

    def std(self, phi: FloatArray) -> FloatArray:
        """Return the deviation of the noise-free value, shape (M,), at phi of shape (M, P)."""
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
class RandomFeatures:
    """Random Fourier features of an RBF kernel on the prior-scaled columns."""

    frequencies: FloatArray
    phases: FloatArray
    amplitude: float

    @staticmethod
    def of_scale(
        phi: FloatArray, relative_length: float, amplitude: float, seed: int
    ) -> RandomFeatures:
        """Draw features whose length scale and amplitude are relative to those of phi."""
        rng = np.random.default_rng(seed)
        squared = float((phi**2).sum(axis=1).mean()) or 1.0
        length = relative_length * np.sqrt(2.0 * squared)
        frequencies = rng.standard_normal((phi.shape[1], _RBF_FEATURES)) / length
        phases = rng.uniform(0.0, 2.0 * np.pi, _RBF_FEATURES)
        size = amplitude * np.sqrt(squared) * np.sqrt(2.0 / _RBF_FEATURES)
        return RandomFeatures(frequencies, phases, float(size))

    def of(self, phi: FloatArray) -> FloatArray:
        """Return the features of phi (M, P), shape (M, F)."""
        return self.of_angle(phi @ self.frequencies)

    def of_angle(self, angle: NDArray[Any]) -> NDArray[Any]:
        """Return the features where ``phi @ frequencies`` (M, F) is known, same shape and dtype."""
        shifted = angle + self.phases.astype(angle.dtype)
        return np.asarray(angle.dtype.type(self.amplitude) * np.cos(shifted, out=shifted))
