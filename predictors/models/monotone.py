"""A monotone map of a skewed, heavy-tailed quantity to a well-behaved scale, and back.

Optional logarithm, robust standardising, then tails that grow only logarithmically: a collapsed
run keeps its place in the order without outweighing all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Normal values beyond three standard deviations are rare enough to be called a tail.
_KNEE = 3.0
_NORMAL_QUARTILES = 1.349
_MAX_EXPONENT = 30.0


@dataclass(frozen=True)
class MonotoneMap:
    """Strictly increasing map; `backward` undoes `forward`.

    Attributes:
        log: whether the logarithm is taken first; then values must be positive.
        centre, scale: median and robust standard deviation after the optional logarithm.
    """

    log: bool
    centre: float
    scale: float

    @staticmethod
    def of(values: FloatArray) -> MonotoneMap:
        """Learn the map from finite values of shape (N,), N at least 1."""
        log = bool(len(values) >= 8 and values.min() > 0 and values.max() > 1.5 * values.min())
        log = log and abs(_skew(np.log(values))) < 0.8 * abs(_skew(values))
        u = np.log(values) if log else values
        low, centre, high = np.quantile(u, [0.25, 0.5, 0.75])
        scale = float(high - low) / _NORMAL_QUARTILES
        # Half of the values may be equal (a rare switch): then only the deviation says a scale.
        if scale <= 1e-9 * abs(centre):
            scale = float(u.std())
        if not np.isfinite(scale) or scale <= 1e-9 * abs(centre):
            scale = 1.0
        return MonotoneMap(log, float(centre), scale)

    def forward(self, values: FloatArray) -> FloatArray:
        """Return the mapped values; what the logarithm cannot take counts as a tiny value."""
        if self.log:
            values = np.log(np.maximum(values, np.exp(self.centre - 40.0 * self.scale)))
        u = (values - self.centre) / self.scale
        size = np.abs(u)
        tail = _KNEE + np.log1p(np.maximum(size - _KNEE, 0.0))
        return np.asarray(np.sign(u) * np.where(size > _KNEE, tail, size))

    def backward(self, mapped: FloatArray) -> FloatArray:
        """Return the values that `forward` maps to `mapped`."""
        size = np.abs(mapped)
        tail = _KNEE + np.expm1(np.clip(size - _KNEE, 0.0, _MAX_EXPONENT))
        u = np.sign(mapped) * np.where(size > _KNEE, tail, size) * self.scale + self.centre
        return np.asarray(np.exp(np.clip(u, -700.0, 700.0)) if self.log else u)

    def slope(self, mapped: FloatArray) -> FloatArray:
        """Return the derivative of `backward`."""
        over = np.clip(np.abs(mapped) - _KNEE, 0.0, _MAX_EXPONENT)
        slope = np.exp(over) * self.scale
        return np.asarray(slope * self.backward(mapped) if self.log else slope)

    def state(self) -> dict[str, Any]:
        """Return the map as JSON values."""
        return asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> MonotoneMap:
        """Rebuild the map from `state`."""
        return MonotoneMap(bool(state["log"]), float(state["centre"]), float(state["scale"]))


def _skew(values: FloatArray) -> float:
    spread = float(values.std())
    return float((((values - values.mean()) / spread) ** 3).mean()) if spread > 0 else 0.0
