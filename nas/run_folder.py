"""A run folder: where things lie, and that it belongs to one config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nas.config import ExperimentConfig, TrainConfig
from searchspace.errors import UserError
from searchspace.files import read_json, remove_leftovers, write_json

# What a folder's tables, weights and evaluations depend on. The other keys (budgets, the search's
# length, sampler, objectives and constraints, what is exported) may change from one command to the
# next, and so may the device that training goes on on.
FREE = ("budget_s", "checkpoint_s", "device", "compile")
IDENTITY = (
    "preset",
    "seed",
    "task",
    *(f"train.{f.name}" for f in fields(TrainConfig) if f.name not in FREE),
    "profile.workloads",
    "profile.backend",
    "profile.num_threads",
    "search.workload",
    "search.evaluation_tokens",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.json"

    @property
    def task(self) -> Path:
        """Folder of tokenizer and tokens."""
        return self.path / "task"

    @property
    def table(self) -> Path:
        """The latency table."""
        return self.path / "latency_table.json"

    @property
    def supernet(self) -> Path:
        """Folder of weights, training state and log."""
        return self.path / "supernet"

    @property
    def metric_scores(self) -> Path:
        """Training-free scores of the pool."""
        return self.path / "metric_scores.json"

    @property
    def search(self) -> Path:
        """The search's summary."""
        return self.path / "search.json"

    @property
    def front(self) -> Path:
        """The measured front."""
        return self.path / "front.json"

    @property
    def subnets(self) -> Path:
        """Folder of exported subnetworks."""
        return self.path / "subnets"

    def claim(self, config: ExperimentConfig) -> ExperimentConfig | None:
        """Write the config into the folder, or check that the folder belongs to it.

        Returns:
            The config that the folder held before.

        Raises:
            UserError: when the folder holds a run of another config, holds foreign files, or
                cannot be written to.
        """
        new = config.to_dict()
        held = None
        if self.config.exists():
            # What an older release wrote lacks newer keys: it means their defaults.
            held = ExperimentConfig.from_dict(read_json(self.config, "run config"))
            for key in IDENTITY:
                before, now = _at(held.to_dict(), key), _at(new, key)
                if before != now:
                    raise UserError(
                        f"{self.path} holds a run with {_difference(key, before, now)}; give "
                        "another --out, or the same values to go on with that run"
                    )
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} is not empty and holds no run (it has no config.json); give another "
                "--out"
            )
        write_json(self.config, new)
        remove_leftovers(self.path)
        return held


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _difference(key: str, before: Any, now: Any) -> str:
    """Name the first value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            if before.get(name) != now[name]:
                return _difference(f"{key}.{name}", before.get(name), now[name])
    return f"{key}={before!r}, not {now!r}"
