"""Groups of measured networks beside each other: hypervolumes, names, errors of prediction."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from nas.front.sources import FrontSources
from nas.pareto import hypervolume, knee_index, non_dominated, normalise
from nas.tasks.base import Task
from nas.tasks.labelled import LabelledTask


def objective_values(record: Mapping[str, Any], names: Sequence[str], workload: str) -> list[float]:
    """Return a record's measured objectives."""
    latency = record["measured"]["latency_ms"]
    by_phase = {f"{name.partition('_')[0]}_ms": value for name, value in reversed(latency.items())}
    values = {
        "loss": record["measured"]["loss"],
        "latency_ms": latency[workload],
        "weight_bytes": record["weight_bytes"],
        "params": record["params"],
        **by_phase,
    }
    return [float(values[name]) for name in names]


def compare(sources: FrontSources, groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Add hypervolumes, chosen networks and prediction errors to the measured records."""
    names, workload = sources.objectives.names, sources.workload
    points = {
        group: np.array([objective_values(r, names, workload) for r in records])
        for group, records in groups.items()
    }
    groups["front"] = [
        record
        for record, keep in zip(groups["front"], non_dominated(points["front"]), strict=True)
        if keep
    ]
    every = np.vstack([values for values in points.values() if len(values)])
    ideal, nadir = every.min(axis=0), every.max(axis=0)
    reference = np.full(len(names), 1.1)
    volumes = {
        group: float(hypervolume(normalise(values, ideal, nadir), reference))
        if len(values)
        else 0.0
        for group, values in points.items()
    }
    return {
        "task": sources.task_name,
        "unit": sources.task.unit,
        "metric": sources.task.metric_name,
        "space": sources.space.name,
        "space_size": str(sources.space.size()),
        "objectives": list(names),
        "workload": workload,
        "workloads": [item.name for item in sources.table.workloads],
        "baselines": sources.task.baselines,
        "accuracy_baselines": _accuracy_baselines(sources.task),
        "groups": groups,
        "hypervolume": {
            **volumes,
            "reference": reference.tolist(),
            "ideal": ideal.tolist(),
            "nadir": nadir.tolist(),
        },
        "chosen": choose(groups["front"], names, workload),
        "latency_error": _latency_error(groups, [w.name for w in sources.table.workloads]),
        "device": sources.table.device.to_dict(),
        "versions": versions(),
    }


def _accuracy_baselines(task: Task) -> dict[str, float]:
    """Return the test accuracy that is reached without a network, by name."""
    if isinstance(task, LabelledTask):
        return {"commonest class": task.majority_accuracy}
    return {}


def choose(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], workload: str
) -> dict[str, str]:
    """Return the arch ids of the best, fastest, smallest and knee networks of a front."""

    def lowest(key: Callable[[Mapping[str, Any]], float]) -> str:
        return str(min(records, key=key)["arch_id"])

    values = np.array([objective_values(r, names, workload) for r in records])
    two = values[:, :2] if values.shape[1] > 1 else values
    return {
        "best": lowest(lambda r: float(r["measured"]["loss"])),
        "fastest": lowest(lambda r: float(r["measured"]["latency_ms"][workload])),
        "smallest": lowest(lambda r: float(r["weight_bytes"])),
        "knee": str(records[knee_index(two)]["arch_id"]),
    }


def _latency_error(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], workloads: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return predicted against measured latency over all measured networks."""
    unique = {r["arch_id"]: r for records in groups.values() for r in records}
    errors: dict[str, dict[str, float]] = {}
    for name in workloads:
        measured = np.array([r["measured"]["latency_ms"][name] for r in unique.values()])
        predicted = np.array([r["predicted"]["latency_ms"][name] for r in unique.values()])
        errors[name] = {
            "mape_percent": float(100 * np.mean(np.abs(predicted / measured - 1))),
            "kendall_tau": float(kendalltau(predicted, measured).statistic),
            "num_networks": len(unique),
        }
    return errors


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    names = ("optuna", "pymoo", "scikit-learn", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in names},
    }
