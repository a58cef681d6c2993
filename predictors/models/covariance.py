"""Covariance functions whose sum is the prior of a Gaussian process.

Each has parameters theta on a log scale (amplitudes are standard deviations), a normal prior on
theta, and gradients by theta in closed form. Letters: N, M rows, P columns, K parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from predictors.models.base import FloatArray, State

Gradient = Callable[[FloatArray], FloatArray]

_SQRT5 = float(np.sqrt(5.0))


class Covariance(Protocol):
    """One term of a covariance function, on some of the columns."""

    kind: ClassVar[str]

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns that it looks at."""
        ...

    def prior(self) -> tuple[FloatArray, FloatArray]:
        """Return the mean and standard deviation of theta's normal prior, each of shape (K,)."""
        ...

    def start(self) -> FloatArray:
        """Return a theta of shape (K,) to begin the search of the best one from."""
        ...

    def between(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return the covariances (N, M) of rows a (N, P) with rows b (M, P)."""
        ...

    def variance(self, theta: FloatArray, a: FloatArray) -> FloatArray:
        """Return the variances (N,) of rows a (N, P)."""
        ...

    def with_gradient(self, theta: FloatArray, a: FloatArray) -> tuple[FloatArray, Gradient]:
        """Return the covariance C (N, N) and the function S -> sum(S * dC/dtheta), shape (K,).

        S must be symmetric.
        """
        ...


@dataclass(frozen=True)
class Linear:
    """A constant plus a linear function: ridge regression as a covariance."""

    columns: tuple[int, ...]
    kind: ClassVar[str] = "linear"

    def prior(self) -> tuple[FloatArray, FloatArray]:
        """Return mean and deviation of theta's prior, (K,) each."""
        return np.zeros(1), np.full(1, 2.0)

    def start(self) -> FloatArray:
        """Return where the search begins, (K,)."""
        return np.zeros(1)

    def between(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return covariances (N, M)."""
        columns = list(self.columns)
        return self._amplitude(theta) * (1.0 + a[:, columns] @ b[:, columns].T)

    def variance(self, theta: FloatArray, a: FloatArray) -> FloatArray:
        """Return variances (N,)."""
        squares = (a[:, list(self.columns)] ** 2).sum(axis=1)
        return np.asarray(self._amplitude(theta) * (1.0 + squares))

    def with_gradient(self, theta: FloatArray, a: FloatArray) -> tuple[FloatArray, Gradient]:
        """Return the covariance (N, N) and its gradient, as `Covariance` says."""
        covariance = self.between(theta, a, a)
        return covariance, lambda S: np.array([2.0 * np.vdot(S, covariance)])

    def _amplitude(self, theta: FloatArray) -> float:
        return float(np.exp(2.0 * theta[0])) / len(self.columns)


@dataclass(frozen=True)
class Matern:
    """Matern 5/2 with one length scale per column.

    The prior prefers long scales, in which a column acts almost linearly or not at all: what a
    few labels cannot tell apart from noise is then left out.
    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, equation 4.17.
    """

    columns: tuple[int, ...]
    amplitude: float = 1.0
    kind: ClassVar[str] = "matern"

    def prior(self) -> tuple[FloatArray, FloatArray]:
        """Return mean and deviation of theta's prior, (K,) each."""
        num = len(self.columns)
        return np.r_[self.amplitude, np.full(num, 3.0)], np.r_[2.0, np.full(num, 2.5)]

    def start(self) -> FloatArray:
        """Return where the search begins, (K,)."""
        return np.r_[min(self.amplitude, 0.0), np.full(len(self.columns), 2.5)]

    def between(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return covariances (N, M)."""
        distance = _SQRT5 * np.sqrt(
            _squared_distances(self._scaled(theta, a), self._scaled(theta, b))
        )
        rest = np.exp(2.0 * theta[0] - distance)
        return np.asarray(rest * (1.0 + distance + distance**2 / 3.0))

    def variance(self, theta: FloatArray, a: FloatArray) -> FloatArray:
        """Return variances (N,)."""
        return np.full(len(a), np.exp(2.0 * theta[0]))

    def with_gradient(self, theta: FloatArray, a: FloatArray) -> tuple[FloatArray, Gradient]:
        """Return the covariance (N, N) and its gradient, as `Covariance` says."""
        scaled = self._scaled(theta, a)
        distance = _SQRT5 * np.sqrt(_squared_distances(scaled, scaled))
        rest = np.exp(2.0 * theta[0] - distance)
        covariance = rest * (1.0 + distance + distance**2 / 3.0)
        slope = (5.0 / 3.0) * rest * (1.0 + distance)

        def gradient(S: FloatArray) -> FloatArray:
            # dC/dlog(length_p) = slope * (difference in p)^2; the square is multiplied out, so
            # that all columns cost one matrix product.
            weighted = S * slope
            squares = weighted.sum(axis=1) @ scaled**2
            by_column = 2.0 * (squares - (scaled * (weighted @ scaled)).sum(axis=0))
            return np.r_[2.0 * np.vdot(S, covariance), by_column]

        return np.asarray(covariance), gradient

    def _scaled(self, theta: FloatArray, a: FloatArray) -> FloatArray:
        return np.asarray(a[:, list(self.columns)] * np.exp(-theta[1:]))


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """A random walk drawn back to zero along one column, such as time.

    Its paths are rough, so it follows sudden changes of state as well as slow ones. The length
    scale is in the column's own unit.
    Source: Rasmussen and Williams, section 4.2.1.
    """

    columns: tuple[int, ...]
    length: float
    kind: ClassVar[str] = "ornstein_uhlenbeck"

    def prior(self) -> tuple[FloatArray, FloatArray]:
        """Return mean and deviation of theta's prior, (K,) each."""
        return np.array([-0.5, np.log(self.length)]), np.full(2, 2.0)

    def start(self) -> FloatArray:
        """Return where the search begins, (K,)."""
        return self.prior()[0]

    def between(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return covariances (N, M)."""
        return np.asarray(np.exp(2.0 * theta[0] - self._lag(theta, a, b)))

    def variance(self, theta: FloatArray, a: FloatArray) -> FloatArray:
        """Return variances (N,)."""
        return np.full(len(a), np.exp(2.0 * theta[0]))

    def with_gradient(self, theta: FloatArray, a: FloatArray) -> tuple[FloatArray, Gradient]:
        """Return the covariance (N, N) and its gradient, as `Covariance` says."""
        lag = self._lag(theta, a, a)
        covariance = np.exp(2.0 * theta[0] - lag)

        def gradient(S: FloatArray) -> FloatArray:
            weighted = S * covariance
            return np.array([2.0 * weighted.sum(), np.vdot(weighted, lag)])

        return np.asarray(covariance), gradient

    def _lag(self, theta: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
        column = self.columns[0]
        return np.abs(a[:, column, None] - b[None, :, column]) * np.exp(-theta[1])


def covariances_state(terms: Sequence[Covariance]) -> list[dict[str, Any]]:
    """Return the terms as JSON values."""
    return [{**vars(term), "kind": term.kind} for term in terms]


def covariances_from_state(state: Sequence[State]) -> tuple[Covariance, ...]:
    """Rebuild the terms that `covariances_state` described."""
    kinds: dict[str, Callable[..., Covariance]] = {
        "linear": Linear,
        "matern": Matern,
        "ornstein_uhlenbeck": OrnsteinUhlenbeck,
    }
    terms = []
    for entry in state:
        rest = {name: value for name, value in entry.items() if name != "kind"}
        terms.append(kinds[entry["kind"]](**{**rest, "columns": tuple(entry["columns"])}))
    return tuple(terms)


def _squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * (a @ b.T)
    return np.maximum(squares, 0.0)
