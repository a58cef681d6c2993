"""The latency tables of a run's devices, in its folder, and how they come there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hw_profiles.latency_table import LatencyTable
from hw_profiles.profiler import finished
from nas.cluster.devices import alone_on
from searchspace.errors import UserError
from searchspace.files import write_text

if TYPE_CHECKING:
    from nas.pipeline import Pipeline


def table_path(pipeline: Pipeline, device: str) -> Path:
    """Return where a device's table lies."""
    return pipeline.folder.path / "devices" / f"{device}.json"


def device_tables(pipeline: Pipeline) -> dict[str, LatencyTable]:
    """Return the tables of a run's devices.

    Raises:
        UserError: when one is not there yet.
    """
    tables: dict[str, LatencyTable] = {}
    for device in pipeline.config.ray.devices:
        path = table_path(pipeline, device)
        if not path.exists():
            raise UserError(
                f"{pipeline.folder.path} holds no latency table of device {device}; run `nas "
                f"search` with --ray and --devices while a node of the cluster offers hw:{device}"
            )
        tables[device] = LatencyTable.load(path)
    return tables


def profile_devices(pipeline: Pipeline, all_of_it: bool = False) -> None:
    """Measure the tables that are not there yet, each on its device, on the connected cluster.

    Args:
        pipeline: the run.
        all_of_it: go on with tables that price every arch but in part by interpolation.

    Raises:
        UserError: when a device is not there, or cannot be had alone.
    """
    config = pipeline.config
    for device in config.ray.devices:
        path = table_path(pipeline, device)
        if path.exists() and _suffices(pipeline, LatencyTable.load(path), all_of_it):
            continue
        options = {
            "backend": config.profile.backend,
            "num_threads": config.profile.num_threads,
            "time_budget_s": pipeline.seconds_for("profile"),
            "seed": config.seed,
            "realtime": config.profile.realtime,
        }
        held = path.read_text(encoding="utf-8") if path.exists() else ""
        workloads = [workload.name for workload in pipeline.workloads]
        space = pipeline.space
        with alone_on(device, pipeline.reporter.say, config.ray.patience_s) as call:
            pipeline.reporter.say(f"device {device}: measuring its latency table")
            text = call("profile", space.to_dict(), space.vocab_size, workloads, held, options)
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
        table = LatencyTable.load(path)
        for workload in table.workloads:
            fit = table.correction(workload)
            pipeline.reporter.say(
                f"device {device}: {workload.name} predicted within {fit.mape:.1f}% on "
                f"{table.measured_on}"
            )


def _suffices(pipeline: Pipeline, table: LatencyTable, all_of_it: bool) -> bool:
    if all_of_it:
        return finished(table, pipeline.space, pipeline.workloads)
    return all(workload.name in table.corrections for workload in pipeline.workloads)
