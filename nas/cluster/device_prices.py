"""The exact costs of candidates on several devices at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table import LatencyCosts, LatencyTable
from nas.candidates import Prices
from searchspace.cost import Rows, rows_of
from searchspace.space import SearchSpace

AT = "@"
"""Stands between a latency metric and a device's name, as in ``latency_ms@orin``."""


class WorstCosts:
    """The latency of many genotypes on the device that is slowest for each of them.

    Args:
        space: the search space.
        costs: of the devices.
    """

    def __init__(self, space: SearchSpace, costs: Sequence[LatencyCosts]) -> None:
        self._space, self._costs = space, tuple(costs)

    def of(self, genotypes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the latency in ms of each row of canonical `genotypes` (n, genes), shape (n,)."""
        chunks = [self.total(rows) for rows in rows_of(self._space, genotypes)]
        return np.concatenate([np.empty(0), *chunks])

    def total(self, rows: Rows) -> NDArray[np.float64]:
        """Return the latency in ms of each row, shape (n,)."""
        return np.max([costs.total(rows) for costs in self._costs], axis=0)


class DevicePrices(Prices):
    """Costs where each device has its table.

    ``latency_ms``, ``prefill_ms`` and ``decode_ms`` are those of the slowest device for an arch;
    ``latency_ms@NAME`` and so on are those of one.

    Args:
        space: the search space.
        tables: of the devices, by name.
        workload: the workload that ``latency_ms`` means.
    """

    def __init__(
        self, space: SearchSpace, tables: Mapping[str, LatencyTable], workload: str
    ) -> None:
        super().__init__(space)
        each: dict[str, dict[str, LatencyCosts]] = {}
        for device, table in tables.items():
            for item in table.workloads:
                costs = table.costs_ms(space, item)
                each.setdefault(f"{item.phase}_ms", {}).setdefault(device, costs)
                if item.name == workload:
                    each.setdefault("latency_ms", {})[device] = costs
        for metric, by_device in each.items():
            self._costs[metric] = WorstCosts(space, list(by_device.values()))
            for device, costs in by_device.items():
                self._costs[metric + AT + device] = costs


def objectives_for(names: Sequence[str], devices: Sequence[str], goal: str) -> tuple[str, ...]:
    """Return the objectives of a search for several devices.

    Args:
        names: of the config.
        devices: their names.
        goal: ``"worst"`` or ``"each"``, see `RayConfig`.
    """
    if goal == "worst":
        return tuple(names)
    found: list[str] = []
    for name in names:
        is_latency = name.endswith("_ms")
        found += [name + AT + device for device in devices] if is_latency else [name]
    return tuple(found)


def objectives_of(names: Sequence[str], device: str) -> list[int]:
    """Return the indices of the objectives that count for one device."""
    return [
        index
        for index, name in enumerate(names)
        if AT not in name or name.rpartition(AT)[2] == device
    ]


def known_metrics(names: Sequence[str], devices: Sequence[str]) -> list[str]:
    """Return metrics and, of latencies, those of each device."""
    timed: list[Any] = [name for name in names if name.endswith("_ms")]
    return [*names, *(name + AT + device for name in timed for device in devices)]
