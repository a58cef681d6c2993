"""The run folder of a trial: made from the base run's files, saved into and from checkpoints.

The base run's files travel through Ray's object store, once for all trials, so nodes need not see
the base run; checkpoints hold only what a trial changes.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hw_profiles.latency_table import LatencyTable
from nas.cluster.job_trials import TABLE, TrialSpec
from nas.config import ExperimentConfig, load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from searchspace.errors import UserError

Files = Mapping[str, bytes]
"""Contents by path within a run folder."""

CONFIG, STUDY, SCORES, SUPERNET, TASK = (
    "config.json", "study.db", "metric_scores.json", "supernet", "task",
)  # fmt: skip
SAMPLER = "sampler.json"
"""In a checkpoint: the state of the sampler's random numbers."""


def read_files(folder: Path, parts: Sequence[str]) -> dict[str, bytes]:
    """Return the files of a run folder that belong to the given parts; absent ones are left out."""
    files: dict[str, bytes] = {}
    for part in parts:
        root = folder / part
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        for path in found:
            if path.is_file() and not path.name.endswith(".tmp"):
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def base_files(folder: Path, tables: Mapping[str, Path], with_supernet: bool) -> dict[str, bytes]:
    """Return what every trial starts from: config, task, scores, weights and latency tables.

    Args:
        folder: the base run.
        tables: further latency tables by device.
        with_supernet: take its weights too.
    """
    parts = [CONFIG, TASK, TABLE, SCORES]
    files = read_files(folder, [*parts, SUPERNET] if with_supernet else parts)
    for device, path in tables.items():
        files[table_name(device)] = path.read_bytes()
    return files


def table_name(device: str) -> str:
    """Return where a device's latency table is among the files; the run's own for no device."""
    return f"{device}/{TABLE}" if device else TABLE


def write_folder(folder: Path, files: Files, spec: TrialSpec) -> ExperimentConfig:
    """Make a trial's run folder anew; return its config, which the folder holds too.

    Raises:
        UserError: when the trial changes what the run's config does not know.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_files(folder, files, spec.device)
    config = trial_config(folder, spec)
    (folder / CONFIG).write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return config


def write_files(folder: Path, files: Files, device: str) -> None:
    """Write files into a run folder, with the latency table of one device."""
    wanted = table_name(device)
    for name, content in files.items():
        if name.endswith(TABLE) and name != wanted:
            continue
        path = folder / (TABLE if name == wanted else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def trial_config(folder: Path, spec: TrialSpec) -> ExperimentConfig:
    """Return a trial's config: that of a base run with the trial's changes.

    The study lies in the trial's folder and one process works on it, whatever the run says.
    Nothing is timed in a trial, so neither the table's backend nor its threads have to be here.
    """
    own = {"search.storage": "", "search.workers": 1, "ray.address": "", "ray.devices": []}
    changes = {key.replace(".", "__"): value for key, value in {**own, **spec.changes}.items()}
    config = load_config(str(folder / CONFIG), out=str(folder), **changes)
    return replace(config, profile=replace(config.profile, backend="eager", num_threads=None))


def save_study(folder: Path, target: Path, sampler: Mapping[str, Any]) -> None:
    """Write a search's state into a checkpoint's folder, consistently while it goes on.

    Args:
        folder: the trial's run folder.
        target: an empty folder.
        sampler: the state of the sampler's random numbers.
    """
    backup_database(folder / STUDY, target / STUDY)
    (target / SAMPLER).write_text(json.dumps(sampler), encoding="utf-8")
    if (folder / SCORES).exists():
        shutil.copy2(folder / SCORES, target / SCORES)


def backup_database(source: Path, target: Path) -> None:
    """Copy an SQLite file as of one moment; what is only in its write-ahead log comes along.

    Source: SQLite documentation, "SQLite Backup API".

    Raises:
        UserError: when there is no such file.
    """
    if not source.is_file():
        raise UserError(f"there is no study at {source}")
    with (
        closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=60.0)) as old,
        closing(sqlite3.connect(target)) as new,
    ):
        old.backup(new)
        # One file, whoever opens it: a checkpoint may lie where logs cannot.
        new.execute("PRAGMA journal_mode=DELETE")


def restore_files(folder: Path, checkpoint: Path) -> None:
    """Put a checkpoint's files into a trial's run folder."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SAMPLER and not path.name.startswith("."):
            target = folder / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def read_sampler(checkpoint: Path) -> dict[str, Any]:
    """Return the state of the sampler's random numbers; empty where a checkpoint holds none."""
    path = checkpoint / SAMPLER
    if not path.is_file():
        return {}
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def start_trial(
    folder: Path, files: Files, spec: TrialSpec, checkpoint: Path | None, num_threads: int
) -> Pipeline:
    """Make a trial's run folder, as its checkpoint left it where there is one, and open it.

    Args:
        folder: of the trial's run; what it holds is replaced.
        files: of the base run.
        spec: what the trial changes.
        checkpoint: the folder of an earlier state.
        num_threads: of one operator.
    """
    write_folder(folder, files, spec)
    if checkpoint is not None:
        restore_files(folder, checkpoint)
    pipeline = open_trial(folder)
    torch.set_num_threads(num_threads)
    return pipeline


def open_trial(folder: Path) -> Pipeline:
    """Open a trial's run folder on whatever machine: its table may be of another device."""
    pipeline = Pipeline(load_config(str(folder / CONFIG), out=str(folder)), Reporter(quiet=True))
    if (folder / TABLE).is_file():
        pipeline.table = LatencyTable.load(folder / TABLE)
    return pipeline
