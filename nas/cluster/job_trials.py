"""The trials of a job: one whole search or one whole training each."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nas.cluster.job_config import JobConfig, SearchGrid, TrainingGrid
from searchspace.errors import UserError

TABLE = "latency_table.json"
MAX_LABEL = 120
"""Letters of a trial's name; it becomes a folder's."""


@dataclass(frozen=True)
class TrialSpec:
    """What one trial does.

    Args:
        label: names it and its folder.
        changes: to the run's config, by dotted key.
        device: whose latency table it searches with; empty for the run's own.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialSpec:
        """Build from `to_dict`'s form."""
        return cls(**values)


def trials_of(job: JobConfig) -> list[TrialSpec]:
    """Return a job's trials, the same whenever they are asked for."""
    if job.search is not None:
        return _searches(job.search)
    assert job.training is not None
    # What is drawn may repeat, and the same training twice says nothing new.
    return list({trial.label: trial for trial in _trainings(job.training)}.values())


def _searches(grid: SearchGrid) -> list[TrialSpec]:
    axes: dict[str, Sequence[Any]] = {
        "search.sampler": grid.samplers,
        "search.num_evaluations": grid.evaluations,
        "seed": grid.seeds,
    }
    devices = list(device_tables(grid.devices)) or [""]
    trials = []
    for device, changes in itertools.product(devices, _combinations(axes)):
        trials.append(TrialSpec(_label(changes, device), changes, device))
    return trials


def _trainings(grid: TrainingGrid) -> list[TrialSpec]:
    axes = {f"train.{name}": values for name, values in grid.hyperparameters.items()}
    if grid.num_samples:
        combinations = _drawn(axes, grid.num_samples, grid.draw_seed)
    else:
        combinations = _combinations(axes)
    return [
        TrialSpec(_label(changes, ""), changes)
        for chosen, seed in itertools.product(combinations, grid.seeds)
        for changes in [{**chosen, "seed": seed}]
    ]


def _combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the axes that have values."""
    given = {name: values for name, values in axes.items() if values}
    return [dict(zip(given, chosen, strict=True)) for chosen in itertools.product(*given.values())]


def _drawn(axes: Mapping[str, Any], number: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{name: _draw(values, rng) for name, values in axes.items()} for _ in range(number)]


def _draw(values: Any, rng: np.random.Generator) -> Any:
    """Draw one of a list, or a number of a range; four digits are enough and stay readable."""
    if not isinstance(values, Mapping):
        return values[int(rng.integers(len(values)))]
    low, high = values["low"], values["high"]
    if isinstance(low, int) and isinstance(high, int):
        return int(rng.integers(low, high + 1))
    if values.get("log"):
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        drawn = float(rng.uniform(low, high))
    return min(max(float(f"{drawn:.4g}"), low), high)


def _label(changes: Mapping[str, Any], device: str) -> str:
    """Name a trial after what makes it different, such as ``laptop-nsga2-200-seed1``."""
    words = [device] if device else []
    for key, value in changes.items():
        if key == "seed":
            words.append(f"seed{value}")
        elif key.startswith("train."):
            words.append(f"{key.removeprefix('train.')}{value}")
        else:
            words.append(str(value))
    label = "-".join(words)
    if len(label) <= MAX_LABEL:
        return label
    return f"{label[:MAX_LABEL]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def device_tables(devices: Sequence[str]) -> dict[str, Path]:
    """Return the latency table's file by the name of its device.

    Args:
        devices: run folders, or files of latency tables; named after the folder or the file.

    Raises:
        UserError: when there is no table, or two have the same name.
    """
    tables: dict[str, Path] = {}
    for text in devices:
        path = Path(text).expanduser()
        file = path / TABLE if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"search.devices names {text!r}, which is neither a run folder with a latency "
                "table nor the file of one; run `nas profile` on that device"
            )
        name = file.resolve().parent.name if file.name == TABLE else file.stem
        if name in tables:
            raise UserError(
                f"search.devices names two devices {name!r}; give one of them another folder"
            )
        tables[name] = file
    return tables
