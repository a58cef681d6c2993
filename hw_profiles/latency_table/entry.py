"""`Entry`: what a latency table says about one sub-block under one workload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MEASURED, INTERPOLATED = "measured", "interpolated"
PRIOR, TRANSFERRED = "prior", "transferred"

_KINDS: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}


@dataclass(frozen=True)
class Entry:
    """The latency of one sub-block under one workload.

    Args:
        ratio: to the sentinel, median over rounds.
        latency_us: `ratio` times the table's sentinel time.
        spread: median absolute deviation / median.
        num_samples: rounds that count.
        kept_fraction: share of samples that ran undisturbed.
        reliable: False when too few did.
        implementation: the class that was timed.
        measured_at: ISO 8601 time, UTC.
        source: ``"measured"``; ``"interpolated"`` between widths; ``"transferred"`` from another
            device's table; or ``"prior"``, of the calibrated roofline.
    """

    ratio: float
    latency_us: float
    spread: float
    num_samples: int
    kept_fraction: float
    reliable: bool
    implementation: str
    measured_at: str
    source: str = MEASURED

    @classmethod
    def predicted(cls, latency_us: float, sentinel_us: float, source: str = PRIOR) -> Entry:
        """Return an entry that nothing was measured for."""
        return cls(
            ratio=latency_us / sentinel_us,
            latency_us=latency_us,
            spread=0.0,
            num_samples=0,
            kept_fraction=0.0,
            reliable=False,
            implementation="",
            measured_at="",
            source=source,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """Build from the fields' values.

        Raises:
            KeyError: for a missing field.
            ValueError: for one of another type or out of range.
        """
        for item in fields(cls):
            value = values[item.name]
            if not isinstance(value, _KINDS[str(item.type)]):
                raise ValueError(f"{item.name}={value!r} is no {item.type}")
        for name in ("latency_us", "ratio"):
            if not 0 < values[name] < math.inf:
                raise ValueError(f"{name}={values[name]!r}")
        return cls(**values)


def between(low: Entry, high: Entry, share: float) -> Entry:
    """Return the entry at a share of the way from one width to another."""

    def mix(name: str) -> float:
        return float((1 - share) * getattr(low, name) + share * getattr(high, name))

    return Entry(
        ratio=mix("ratio"),
        latency_us=mix("latency_us"),
        spread=max(low.spread, high.spread),
        num_samples=min(low.num_samples, high.num_samples),
        kept_fraction=min(low.kept_fraction, high.kept_fraction),
        reliable=low.reliable and high.reliable,
        implementation=low.implementation,
        measured_at=min(low.measured_at, high.measured_at),
        source=INTERPOLATED,
    )
