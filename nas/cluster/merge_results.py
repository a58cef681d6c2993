"""What a job's trials found, brought together: one study, front and report for each device.

The searches of a job have the supernet and the task in common, so an arch that was evaluated in
the search for one device is an evaluated arch for every other: only its latency is another.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.cluster.job_config import JobConfig
from nas.cluster.job_trials import TrialSpec, device_tables
from nas.cluster.trial_folder import (
    CONFIG,
    SUPERNET,
    Files,
    open_trial,
    restore_files,
    write_files,
    write_folder,
)
from nas.config import load_config
from nas.pareto import FloatArray, hypervolume, non_dominated, normalise
from nas.pipeline import Pipeline
from nas.report import write_report
from nas.study import (
    Evaluated,
    adopt,
    evaluated,
    open_study,
    search_summary,
    space_key,
    sqlite_url,
    studies_at,
)
from nas.study.archive import REFERENCE
from searchspace.files import write_json

SEARCH = "search.json"
TRIALS = "trials.json"


@dataclass(frozen=True)
class Found:
    """What a trial left.

    Args:
        spec: the trial.
        state: the folder of its last checkpoint.
        metrics: its last report.
    """

    spec: TrialSpec
    state: Path
    metrics: Mapping[str, Any]


def merge_searches(job: JobConfig, files: Files, found: Sequence[Found]) -> list[dict[str, Any]]:
    """Merge searches into a run folder for each device: study, front and report.

    Doing it again, with more found, changes only what is new.

    Args:
        job: the job.
        files: of the base run.
        found: the trials' studies.

    Returns:
        For each device ``device``, ``folder``, ``report``, ``evaluations``, ``front`` (members),
        ``hypervolume`` (of the merged front, every objective scaled over all evaluated archs),
        and ``trials`` with the same figures for each search for that device.
    """
    assert job.search is not None
    devices = list(device_tables(job.search.devices)) or [""]
    out = Path(job.out)
    return [
        _merge_for(device, out / device if len(devices) > 1 else out, files, found)
        for device in devices
    ]


def _merge_for(device: str, folder: Path, files: Files, found: Sequence[Found]) -> dict[str, Any]:
    make_run(folder, files, device, with_supernet=True)
    with _priced(files, device) as run:
        objectives = run.objectives
        study = open_study(
            sqlite_url(folder), objectives, space=space_key(run.space), price=run.exact_metrics
        )
        for trial in found:
            for source in studies_at(sqlite_url(trial.state)):
                adopt(study, source, objectives, run.exact_metrics)
        title = _title(found, run.config.search.sampler)
    write_json(folder / SEARCH, {**search_summary(study, objectives, title), "metrics": {}})
    items = evaluated(study)
    everything = _feasible(items, len(objectives.names))
    summary = {
        "device": device,
        "folder": str(folder),
        "evaluations": len(items),
        "front": int(non_dominated(everything).sum()) if len(everything) else 0,
        "hypervolume": scaled_hypervolume(everything, everything),
        "trials": [_row(trial, everything) for trial in found if trial.spec.device == device],
    }
    write_json(folder / TRIALS, summary)
    return {**summary, "report": str(write_report(folder))}


def _title(found: Sequence[Found], own: str) -> str:
    """Name the samplers of the merged searches for the report."""
    samplers = sorted({str(trial.spec.changes.get("search.sampler", own)) for trial in found})
    return f"{', '.join(samplers)} ({len(found)} searches)"


def make_run(folder: Path, files: Files, device: str, with_supernet: bool) -> None:
    """Make a run folder like the base run, with a device's table, unless it is there already."""
    if (folder / CONFIG).exists():
        return
    left_out = (CONFIG,) if with_supernet else (CONFIG, SUPERNET)
    wanted = {
        name: content for name, content in files.items() if name.split("/")[0] not in left_out
    }
    write_files(folder, wanted, device)
    values = json.loads(files[CONFIG])
    values["out"] = str(folder)
    values["search"] = {**values.get("search", {}), "storage": ""}
    # The config comes last: a folder that has one is whole.
    write_json(folder / CONFIG, values)


@contextmanager
def _priced(files: Files, device: str) -> Iterator[Pipeline]:
    """Open a run for its space and prices only, as a trial does, on whatever machine."""
    light = {name: content for name, content in files.items() if not name.startswith(SUPERNET)}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "run", light, TrialSpec("merge", {}, device))
        yield open_trial(Path(folder) / "run")


def _feasible(items: Sequence[Evaluated], num_objectives: int) -> FloatArray:
    """Return the objective values (N, M) of what keeps the constraints."""
    values = [item.values for item in items if item.feasible]
    return np.array(values, dtype=np.float64).reshape(-1, num_objectives)


def _row(trial: Found, everything: FloatArray) -> dict[str, Any]:
    """Return a search's figures on the scale of the merged one."""
    items = [item for study in studies_at(sqlite_url(trial.state)) for item in evaluated(study)]
    own = _feasible(items, everything.shape[1])
    return {
        "label": trial.spec.label,
        "evaluations": int(trial.metrics.get("evaluations", 0)),
        "best": trial.metrics.get("best"),
        "hypervolume": scaled_hypervolume(own, everything),
    }


def scaled_hypervolume(values: FloatArray, everything: FloatArray) -> float:
    """Return the hypervolume of points (N, M), scaled to where others (K, M) reach 0 to 1."""
    if not len(values):
        return 0.0
    unit = normalise(values, everything.min(axis=0), everything.max(axis=0))
    front = unit[non_dominated(unit)]
    return float(hypervolume(front, np.full(front.shape[1], REFERENCE)))


def merge_trainings(job: JobConfig, files: Files, found: Sequence[Found]) -> list[dict[str, Any]]:
    """Make a run folder of every training; return them, the lowest mean held-out loss first.

    Returns:
        For each ``label``, ``folder``, its ``changes`` to the config and its losses.
    """
    rows = []
    for trial in found:
        folder = Path(job.out) / trial.spec.label
        make_run(folder, files, "", with_supernet=False)
        changes = {key.replace(".", "__"): value for key, value in trial.spec.changes.items()}
        config = load_config(str(folder / CONFIG), out=str(folder), **changes)
        write_json(folder / CONFIG, config.to_dict())
        restore_files(folder, trial.state)
        losses = {k: v for k, v in trial.metrics.items() if k.startswith("loss_")}
        rows.append(
            {"label": trial.spec.label, "folder": str(folder), "changes": dict(trial.spec.changes),
             **losses}
        )  # fmt: skip
    rows.sort(key=lambda row: float(row.get("loss_random", float("inf"))))
    write_json(Path(job.out) / TRIALS, rows)
    return rows
