"""What a latency table says about itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hw_profiles.latency_table import MEASURED, Entry, LatencyTable

NUM_LARGEST = 5


def describe(table: LatencyTable) -> dict[str, Any]:
    """Return everything worth knowing about a table, JSON-ready."""
    times = [entry.measured_at for entry in table.entries.values() if entry.measured_at]
    return {
        "measured_on": table.measured_on,
        "first_measured_at": min(times, default=""),
        "measured_at": table.measured_at,
        "device_id": table.device.id,
        "device": table.device.to_dict(),
        "sentinel_us": table.sentinel_us,
        "spaces": [{"name": s.name, "vocab_size": s.vocab_size} for s in table.spaces],
        "num_entries": len(table.entries),
        "workloads": {item.name: _describe(table, item.name) for item in table.workloads},
    }


def _describe(table: LatencyTable, workload: str) -> dict[str, Any]:
    entries = {key: e for (name, key), e in table.entries.items() if name == workload}
    largest = sorted(entries, key=lambda key: entries[key].latency_us, reverse=True)[:NUM_LARGEST]
    fit = table.corrections.get(workload)
    return {
        "num_entries": len(entries),
        "sources": dict(Counter(entry.source for entry in entries.values())),
        "correction": None if fit is None else fit.to_dict(),
        "largest": [{"key": key, "latency_us": entries[key].latency_us} for key in largest],
        "unreliable": [_shortly(key, e) for key, e in entries.items() if _is_disturbed(e)],
    }


def _is_disturbed(entry: Entry) -> bool:
    return entry.source == MEASURED and not entry.reliable


def _shortly(key: str, entry: Entry) -> dict[str, Any]:
    return {"key": key, "latency_us": entry.latency_us, "kept_fraction": entry.kept_fraction}
