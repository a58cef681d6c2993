"""Gaussian process with heavy-tailed noise, on a sum of covariance terms.

Latencies and losses have outliers and states; under normal noise a handful of them pulls the
whole function. Here each row's noise has its own weight (Student-t noise), found by
expectation-maximisation between two searches of the covariance's parameters.
Letters: N training rows, M rows to predict, P columns, K parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.optimize import minimize

from predictors.models.base import FloatArray, State
from predictors.models.covariance import (
    Covariance,
    covariances_from_state,
    covariances_state,
)

IndexArray = NDArray[np.int64]

_DEGREES = 4.0
_JITTER = 1e-8
_ROUNDS = 6
_MAX_SEARCHED = 400
_STRETCHES = 4
_NOISE_PRIOR = (-2.0, 2.0)
_NOISE_START = -1.0
# A parameter is searched within this many prior standard deviations.
_REACH = 4.0


class GaussianProcess:
    """Regression by a Gaussian process whose parameters maximise their posterior density.

    The marginal likelihood has a normal prior on every log parameter. With many rows the
    parameters are searched on a random part of them; the fit itself uses all.
    Source: Rasmussen and Williams, sections 2.2 and 5.4 (equation 5.9); noise weights: Lange,
    Little and Taylor, Robust Statistical Modeling Using the t Distribution, 1989.

    Args:
        terms: covariance terms, summed.
        seed: of the draw of the part that parameters are searched on.
        along: a column, such as time, along which neighbours matter: the part then consists of
            unbroken stretches of it.
    """

    def __init__(
        self, terms: Sequence[Covariance], seed: int = 0, along: int | None = None
    ) -> None:
        self.terms = tuple(terms)
        self.seed = seed
        self.along = along
        means, stds = zip(*(term.prior() for term in self.terms), strict=True)
        self._prior_mean = np.append(np.concatenate(means), _NOISE_PRIOR[0])
        self._prior_std = np.append(np.concatenate(stds), _NOISE_PRIOR[1])

    def fit(self, X: FloatArray, y: FloatArray) -> Self:
        """Search the parameters and condition on the rows; X (N, P), y (N,)."""
        self._set_units(y)
        z = (y - self._centre) / self._scale
        rows = self._searched_rows(X)
        start = np.append(np.concatenate([term.start() for term in self.terms]), _NOISE_START)
        noise = np.ones(len(rows))
        self.theta = self._search(start, X[rows], z[rows], noise, 60)
        self.theta, noise = self._weigh(self.theta, X[rows], z[rows], noise)
        self.theta = self._search(self.theta, X[rows], z[rows], noise, 25)
        return self._condition(X, z)

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation of a new observation, noise included: (M,) each."""
        cross = self._covariance(self.theta, X, self.X)
        spread = lapack.dtrtrs(self._lower, np.asfortranarray(cross.T), lower=1)[0]
        variance = sum(term.variance(theta, X) for term, theta in self._split(self.theta))
        left = np.maximum(variance - (spread**2).sum(axis=0), 0.0)
        noise = np.exp(2.0 * self.theta[-1])
        mean = self._centre + self._scale * (cross @ self._dual)
        return np.asarray(mean), np.asarray(self._scale * np.sqrt(left + noise))

    def part(self, index: int, X: FloatArray) -> FloatArray:
        """Return the mean of one term's own function at X (M, P), shape (M,), without a centre."""
        term, theta = list(self._split(self.theta))[index]
        return np.asarray(self._scale * (term.between(theta, X, self.X) @ self._dual))

    def leave_one_out(self) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation at each training row from all others, (N,) each.

        Source: Rasmussen and Williams, equations 5.10 to 5.12; parameters stay as they are.
        """
        diagonal = np.diag(_inverse(self._lower))
        mean = self._targets - self._dual / diagonal
        # The row's own noise weight is not known before it is seen: give it the usual noise.
        own = np.exp(2.0 * self.theta[-1]) * (1.0 - self._noise)
        std = np.sqrt(np.maximum(1.0 / diagonal + own, np.exp(2.0 * self.theta[-1])))
        return self._centre + self._scale * mean, self._scale * std

    def leave_one_out_part(self, index: int) -> FloatArray:
        """Return one term's own mean at each training row from all other rows, (N,)."""
        term, theta = list(self._split(self.theta))[index]
        covariance = term.between(theta, self.X, self.X)
        inverse = _inverse(self._lower)
        removed = (covariance * inverse).sum(axis=1) * self._dual / np.diag(inverse)
        return np.asarray(self._scale * (covariance @ self._dual - removed))

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs."""
        return {
            "terms": covariances_state(self.terms),
            "seed": self.seed,
            "along": self.along,
            "centre": self._centre,
            "scale": self._scale,
            "theta": self.theta,
            "X": self.X,
            "targets": self._targets,
            "noise": self._noise,
            "dual": self._dual,
            "lower": self._lower,
        }

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild a fitted process."""
        process = cls(covariances_from_state(state["terms"]), state["seed"], state["along"])
        process._centre, process._scale = float(state["centre"]), float(state["scale"])
        process.theta, process.X = state["theta"], state["X"]
        process._targets, process._noise = state["targets"], state["noise"]
        process._dual, process._lower = state["dual"], np.asfortranarray(state["lower"])
        return process

    def _set_units(self, y: FloatArray) -> None:
        self._centre = float(np.median(y))
        self._scale = float(np.std(y)) or 1.0

    def _searched_rows(self, X: FloatArray) -> IndexArray:
        num = len(X)
        if num <= _MAX_SEARCHED:
            return np.arange(num)
        if self.along is None:
            return np.sort(np.random.default_rng(self.seed).permutation(num)[:_MAX_SEARCHED])
        length = _MAX_SEARCHED // _STRETCHES
        starts = np.linspace(0, num - length, _STRETCHES).astype(np.int64)
        picked = np.unique(starts[:, None] + np.arange(length))
        return np.asarray(np.argsort(X[:, self.along], kind="stable")[picked])

    def _split(self, theta: FloatArray) -> Iterator[tuple[Covariance, FloatArray]]:
        end = 0
        for term in self.terms:
            begin, end = end, end + len(term.prior()[0])
            yield term, theta[begin:end]

    def _covariance(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        return np.asarray(sum(term.between(part, a, b) for term, part in self._split(theta)))

    def _search(
        self, start: FloatArray, X: FloatArray, z: FloatArray, noise: FloatArray, iterations: int
    ) -> FloatArray:
        reach = _REACH * self._prior_std
        low, high = self._prior_mean - reach, self._prior_mean + reach
        found = minimize(
            self._loss,
            np.clip(start, low, high),
            (X, z, noise),
            method="L-BFGS-B",
            jac=True,
            bounds=np.stack([low, high], axis=1),
            options={"maxiter": iterations},
        )
        return np.asarray(found.x)

    def _loss(
        self, theta: FloatArray, X: FloatArray, z: FloatArray, noise: FloatArray
    ) -> tuple[float, FloatArray]:
        """Negative log posterior of theta, per row (so that steps have one size), and gradient."""
        parts = [term.with_gradient(part, X) for term, part in self._split(theta)]
        variance = np.exp(2.0 * theta[-1]) * noise
        lower = _cholesky(np.asarray(sum(part for part, _ in parts)), variance)
        deviation = (theta - self._prior_mean) / self._prior_std
        if lower is None:
            return 1e3, deviation / self._prior_std / len(z)
        dual = _solve(lower, z)
        loss = 0.5 * (z @ dual + deviation @ deviation) + np.log(np.diag(lower)).sum()
        pull = _inverse(lower) - np.outer(dual, dual)
        slopes = [0.5 * gradient(pull) for _, gradient in parts] + [[np.diag(pull) @ variance]]
        return loss / len(z), (np.concatenate(slopes) + deviation / self._prior_std) / len(z)

    def _weigh(
        self, theta: FloatArray, X: FloatArray, z: FloatArray, noise: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return theta with the noise fitted anew, and each row's noise relative to it, (N,)."""
        theta = theta.copy()
        covariance = self._covariance(theta, X, X)
        for _ in range(_ROUNDS):
            usual = np.exp(2.0 * theta[-1])
            variance = usual * noise
            lower = _cholesky(covariance, variance)
            if lower is None:
                break
            residual = variance * _solve(lower, z)
            posterior = np.maximum(variance - variance**2 * np.diag(_inverse(lower)), 0.0)
            squared = residual**2 + posterior
            noise = (_DEGREES + squared / usual) / (_DEGREES + 1.0)
            step = 0.5 * np.log(np.mean(squared / noise) / usual)
            floor = _NOISE_PRIOR[0] - _REACH * _NOISE_PRIOR[1]
            theta[-1] = max(theta[-1] + step, floor)
        return theta, noise

    def _condition(self, X: FloatArray, z: FloatArray) -> Self:
        self.theta, self._noise = self._weigh(self.theta, X, z, np.ones(len(z)))
        variance = np.exp(2.0 * self.theta[-1]) * self._noise
        lower = _cholesky(self._covariance(self.theta, X, X), variance)
        if lower is None:
            raise np.linalg.LinAlgError("the covariance is singular at every noise level")
        self.X, self._targets, self._lower = np.ascontiguousarray(X), z, lower
        self._dual = _solve(lower, z)
        return self


def _cholesky(covariance: FloatArray, noise: FloatArray) -> FloatArray | None:
    """Return the lower factor of covariance + diag(noise), or None if it is singular."""
    total = np.array(covariance, order="F")
    total[np.diag_indices(len(noise))] += noise + _JITTER
    lower, failed = lapack.dpotrf(total, lower=1, clean=1, overwrite_a=1)
    return None if failed else lower


def _solve(lower: FloatArray, z: FloatArray) -> FloatArray:
    return np.asarray(lapack.dpotrs(lower, z, lower=1)[0])


def _inverse(lower: FloatArray) -> FloatArray:
    half = lapack.dpotri(lower, lower=1)[0]
    return np.tril(half) + np.tril(half, -1).T
