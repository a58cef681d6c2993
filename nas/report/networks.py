"""Measured networks as the report reads them, whatever their records hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Network:
    """One network that was measured.

    Args:
        arch_id: ten hexadecimal digits.
        group: one of `GROUPS`.
        name: a readable name, or empty.
        arch: `Arch.to_dict` form.
        params: number of parameters, counted.
        weight_bytes: bytes of the stored weights, counted.
        loss: measured on the test split, in nats per unit.
        accuracy: measured on the test split, 0 to 1; None for tasks that are not judged by it.
        search_loss: measured on the validation split during the search.
        latency_ms: measured, by workload.
        predicted_ms: predicted, by workload.
        peak_mib: measured peak memory.
        energy_mj: measured in millijoule, by workload; empty where the machine has no meter.
    """

    arch_id: str
    group: str
    name: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    params: float | None = None
    weight_bytes: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    search_loss: float | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    energy_mj: Mapping[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The layer slots, skipped ones included."""
        return [layer for layer in self.arch.get("layers", ()) if isinstance(layer, Mapping)]

    @property
    def depth(self) -> int:
        """Number of layer slots that are not skipped."""
        return sum(not layer.get("skip", False) for layer in self.layers)

    @property
    def label(self) -> str:
        """The name if there is one, else the id."""
        return self.name or self.arch_id


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def finite(value: Any) -> float | None:
    """Return a finite number as float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(value: Any) -> dict[str, float]:
    """Return the finite numbers of a mapping."""
    found = {str(key): finite(item) for key, item in mapping(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def networks_of(records: Any, group: str) -> tuple[Network, ...]:
    """Return the networks of a group's records in `front.json`."""
    return tuple(_network(mapping(record), group) for record in records or ())


def _network(record: Mapping[str, Any], group: str) -> Network:
    measured, predicted = mapping(record.get("measured")), mapping(record.get("predicted"))
    return Network(
        arch_id=str(record.get("arch_id", "")),
        group=group,
        name=str(record.get("name") or ""),
        arch=mapping(record.get("arch")),
        params=finite(record.get("params")),
        weight_bytes=finite(record.get("weight_bytes")),
        loss=finite(measured.get("loss")),
        accuracy=finite(measured.get("accuracy")),
        search_loss=finite(record.get("search_loss")),
        latency_ms=numbers(measured.get("latency_ms")),
        predicted_ms=numbers(predicted.get("latency_ms")),
        peak_mib=finite(measured.get("peak_mib")),
        energy_mj=numbers(measured.get("energy_mj")),
    )
