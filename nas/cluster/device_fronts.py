"""The fronts of a search for several devices: chosen, and measured on the devices themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.cluster.device_prices import AT, objectives_of
from nas.cluster.device_tables import device_tables, table_path
from nas.cluster.devices import alone_on
from nas.front import select_front
from nas.pareto import non_dominated
from nas.study import Evaluated
from searchspace.arch import Arch
from searchspace.files import write_json

if TYPE_CHECKING:
    from nas.pipeline import Pipeline

WORST = "worst"


def fronts_path(pipeline: Pipeline) -> Path:
    """Return where the fronts are written."""
    return pipeline.folder.path / "device_fronts.json"


def write_device_fronts(pipeline: Pipeline, items: Sequence[Evaluated]) -> None:
    """Choose each front, measure its archs on every device that it is for, and write them.

    Args:
        pipeline: the run.
        items: what its search has evaluated.

    Nothing is written when no arch keeps the constraints; the search says so.

    Raises:
        UserError: when a device is not there, or does not become free.
    """
    config, names = pipeline.config, pipeline.objectives.names
    devices = config.ray.devices
    if not any(item.feasible for item in items):
        return
    fronts = chosen_fronts(items, names, devices, config.ray.goal, config.export.front_size)
    measured = {
        device: measured_on(pipeline, device, fronts.get(device, fronts.get(WORST, [])))
        for device in devices
    }
    predicted = predictions(pipeline, [item.arch for front in fronts.values() for item in front])
    records = {
        name: still_on_front(
            [
                record(item, pipeline.exact_metrics(item.arch), names, predicted, measured)
                for item in front
            ],
            *counting(name, names, devices),
            pipeline.workload,
        )
        for name, front in fronts.items()
    }
    tables = device_tables(pipeline)
    content = {
        "goal": config.ray.goal,
        "workload": pipeline.workload,
        "objectives": list(names),
        "devices": {device: table.device.to_dict() for device, table in tables.items()},
        "fronts": records,
    }
    write_json(fronts_path(pipeline), content)
    sizes = ", ".join(f"{name} {len(front)}" for name, front in records.items())
    pipeline.reporter.say(f"device fronts ({sizes} archs): {fronts_path(pipeline)}")


def measured_on(
    pipeline: Pipeline, device: str, items: Sequence[Evaluated]
) -> dict[str, dict[str, float]]:
    """Return latencies in ms by arch id and workload, measured alone on a device.

    Raises:
        UserError: when the device is not there, or does not become free.
    """
    config = pipeline.config
    with alone_on(device, pipeline.reporter.say, config.ray.patience_s) as call:
        pipeline.reporter.say(f"device {device}: measuring {len(items)} archs of the front")
        found: dict[str, dict[str, float]] = call(
            "time",
            [item.arch.to_dict() for item in items],
            table_path(pipeline, device).read_text(encoding="utf-8"),
            config.profile.num_threads,
            config.seed,
        )
    return found


def chosen_fronts(
    items: Sequence[Evaluated], names: Sequence[str], devices: Sequence[str], goal: str, size: int
) -> dict[str, list[Evaluated]]:
    """Return the predicted fronts by device, or the only one as ``"worst"``.

    Args:
        items: what was evaluated.
        names: of the objectives.
        devices: their names.
        goal: see `RayConfig`.
        size: of each front at most.
    """
    if goal == WORST:
        return {WORST: select_front(items, size)}
    fronts: dict[str, list[Evaluated]] = {}
    for device in devices:
        columns = objectives_of(names, device)
        own = [replace(item, values=tuple(item.values[i] for i in columns)) for item in items]
        whole = {item.arch.id: item for item in items}
        fronts[device] = [whole[item.arch.id] for item in select_front(own, size)]
    return fronts


def counting(
    front: str, names: Sequence[str], devices: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the objectives and the devices that count for a front."""
    if front == WORST:
        return list(names), list(devices)
    return [names[i] for i in objectives_of(names, front)], [front]


def predictions(
    pipeline: Pipeline, archs: Sequence[Arch]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the tables' latencies in ms by device, arch id and workload."""
    return {
        device: {
            arch.id: {item.name: table.latency_ms(arch, item) for item in table.workloads}
            for arch in archs
        }
        for device, table in device_tables(pipeline).items()
    }


def record(
    item: Evaluated,
    metrics: Mapping[str, float],
    names: Sequence[str],
    predicted: Mapping[str, Mapping[str, Mapping[str, float]]],
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """Return what is written of an arch; latencies are by device and workload, in ms."""
    arch_id = item.arch.id
    return {
        "arch_id": arch_id,
        "arch": item.arch.to_dict(),
        "search_loss": item.values[list(names).index("loss")],
        "params": int(metrics["params"]),
        "weight_bytes": int(metrics["weight_bytes"]),
        "measured": {d: {"latency_ms": found[arch_id]} for d, found in measured.items()
                     if arch_id in found},
        "predicted": {d: {"latency_ms": found[arch_id]} for d, found in predicted.items()
                      if arch_id in measured[d]},
    }  # fmt: skip


def still_on_front(
    records: list[dict[str, Any]], names: Sequence[str], devices: Sequence[str], workload: str
) -> list[dict[str, Any]]:
    """Return the archs that no other beats in what was measured.

    Args:
        records: of `record`.
        names: of the objectives that count for this front.
        devices: that it is for; latencies that name none are those of the slowest.
        workload: the workload that ``latency_ms`` means.
    """
    if not records:
        return records
    points = np.array([[_value(r, name, devices, workload) for name in names] for r in records])
    return [r for r, keep in zip(records, non_dominated(points), strict=True) if keep]


def _value(record: Mapping[str, Any], name: str, devices: Sequence[str], workload: str) -> float:
    metric, _, device = name.partition(AT)
    if not metric.endswith("_ms"):
        return float(record["search_loss" if metric == "loss" else metric])
    phase = metric.removesuffix("_ms")
    latencies = [record["measured"][d]["latency_ms"] for d in ([device] if device else devices)]
    timed = [w for w in latencies[0] if w.startswith(phase)]
    chosen = workload if metric == "latency_ms" else timed[0]
    return max(float(found[chosen]) for found in latencies)
