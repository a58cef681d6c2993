"""Comparing latencies of the same sub-blocks: two tables, or a table and the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from hw_profiles.latency_table import LatencyTable
from searchspace.errors import UserError

NEAR_PCT = 10.0
"""Latencies that differ by no more count as near."""


@dataclass(frozen=True)
class Ratios:
    """What ratios of two latencies of each of several things say together.

    Args:
        num: how many there are.
        median: of the ratios.
        spread: median absolute deviation / median.
        near_pct: percentage of them within `tolerance_pct` of 1.
        tolerance_pct: what counts as near; a latency of 1.1 times another is 10 % off, as the
            other is from it.
    """

    num: int
    median: float
    spread: float
    near_pct: float
    tolerance_pct: float = NEAR_PCT

    @classmethod
    def of(cls, ratios: Iterable[float], tolerance_pct: float = NEAR_PCT) -> Ratios:
        """Summarise at least one ratio."""
        values = list(ratios)
        middle = statistics.median(values)
        near = sum(_off_pct(value) <= tolerance_pct for value in values)
        return cls(
            num=len(values),
            median=middle,
            spread=statistics.median(abs(value - middle) for value in values) / middle,
            near_pct=100 * near / len(values),
            tolerance_pct=tolerance_pct,
        )

    @property
    def is_near(self) -> bool:
        """Whether the median is near 1."""
        return _off_pct(self.median) <= self.tolerance_pct


def _off_pct(ratio: float) -> float:
    return 100 * (max(ratio, 1 / ratio) - 1)


@dataclass(frozen=True)
class Comparison:
    """How a second table differs from a first.

    Args:
        differences: a sentence for each fact of the device that differs.
        ratios: second / first, by workload name, over the sub-blocks that both hold.
        furthest: (workload, key, first in us, second in us) of the sub-blocks whose ratio is
            furthest from their workload's median, furthest first.
        only_first: entries that only the first holds.
        only_second: entries that only the second holds.
    """

    differences: tuple[str, ...]
    ratios: dict[str, Ratios]
    furthest: tuple[tuple[str, str, float, float], ...]
    only_first: int
    only_second: int


def compare(first: LatencyTable, second: LatencyTable, num_furthest: int = 10) -> Comparison:
    """Compare two tables, entry by entry.

    Raises:
        UserError: when they have no entry in common.
    """
    common = [key for key in first.entries if key in second.entries]
    if not common:
        raise UserError(
            "the two tables have no entry in common: they were measured for other search spaces "
            "or workloads, so only `nas profile show` says more"
        )
    ratios = {key: second.entries[key].latency_us / first.entries[key].latency_us for key in common}
    by_workload = {
        name: Ratios.of(ratio for (workload, _), ratio in ratios.items() if workload == name)
        for name in dict.fromkeys(workload for workload, _ in common)
    }

    def distance(key: tuple[str, str]) -> float:
        return abs(math.log(ratios[key] / by_workload[key[0]].median))

    furthest = sorted(common, key=distance, reverse=True)[:num_furthest]
    return Comparison(
        differences=tuple(first.device.difference(second.device)),
        ratios=by_workload,
        furthest=tuple(
            (*key, first.entries[key].latency_us, second.entries[key].latency_us)
            for key in furthest
        ),
        only_first=len(first.entries) - len(common),
        only_second=len(second.entries) - len(common),
    )
