"""The TOML file of `nas cluster`: which whole searches, or whole trainings, are run where."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nas.config import TrainConfig
from nas.config_values import build_config
from searchspace.errors import UserError, unknown
from searchspace.files import read_toml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
URI = re.compile(r"[a-z][a-z0-9+.-]+://.+")
HYPERPARAMETERS = tuple(
    item.name for item in fields(TrainConfig) if item.name not in ("checkpoint_s", "budget_s")
)
"""Keys of the train section that a training may try values of."""


@dataclass(frozen=True)
class SearchGrid:
    """Searches: one for each combination.

    Args:
        samplers: names in `nas.samplers.SAMPLERS`; none for that of the run.
        seeds: of the sampler.
        evaluations: budgets, in evaluated archs; none for that of the run.
        devices: run folders or latency tables of the devices to search for; none for the run's own.
    """

    samplers: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    evaluations: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from nas.samplers import SAMPLERS

        for name in self.samplers:
            if name not in SAMPLERS:
                raise unknown("search.samplers", name, SAMPLERS)
        check_numbers("search.seeds", self.seeds, 0)
        check_numbers("search.evaluations", self.evaluations, 1)
        for name in ("samplers", "evaluations", "devices"):
            check_different(f"search.{name}", getattr(self, name))


@dataclass(frozen=True)
class TrainingGrid:
    """Supernet trainings: one for each combination of the lists, or as many as are drawn.

    Args:
        seeds: of the trainings.
        num_workers: processes that train one supernet together.
        num_samples: trainings to draw; 0 for every combination of the lists.
        draw_seed: of what is drawn.
        hyperparameters: by key of the config's train section: a list of values, or a range that
            is drawn from, ``{low = 0.001, high = 0.1, log = true}``.
    """

    seeds: tuple[int, ...] = (0,)
    num_workers: int = 1
    num_samples: int = 0
    draw_seed: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers("training.seeds", self.seeds, 0)
        check_numbers("training.num_workers", (self.num_workers,), 1)
        check_numbers("training.num_samples", (self.num_samples,), 0)
        for name, values in self.hyperparameters.items():
            if name not in HYPERPARAMETERS:
                raise unknown("training.hyperparameters", name, HYPERPARAMETERS)
            _check_values(f"training.hyperparameters.{name}", values, self.num_samples)


def _check_values(key: str, values: Any, num_samples: int) -> None:
    """Refuse what is neither a list of values nor a range that is drawn from."""
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        return
    how_to = "give a list of values, or {low = NUMBER, high = NUMBER}, log = true if need be"
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values):
        raise UserError(f"{key}={values!r} is not understood; {how_to}")
    for name in values:
        if name not in ("low", "high", "log"):
            raise unknown(f"{key} key", name, ("low", "high", "log"))
    low, high = values["low"], values["high"]
    if not low <= high or (values.get("log") and low <= 0):
        raise UserError(f"{key} goes from {low!r} to {high!r}, which is no range; {how_to}")
    if not num_samples:
        raise UserError(
            f"{key} is a range and training.num_samples is 0; say how many trainings to draw, or "
            "give a list of values"
        )


def check_numbers(key: str, values: Sequence[Any], lowest: int) -> None:
    """Refuse what are no whole numbers, too small ones, and repeated ones.

    Raises:
        UserError: naming the first.
    """
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise UserError(f"{key} holds {value!r}; it takes whole numbers from {lowest} up")
    check_different(key, values)


def check_different(key: str, values: Sequence[Any]) -> None:
    """Refuse a value that is there twice: its trials would be the same.

    Raises:
        UserError: naming it.
    """
    for value in values:
        if list(values).count(value) > 1:
            raise UserError(f"{key} holds {value!r} twice; name each once")


@dataclass(frozen=True)
class JobConfig:
    """One job of `nas cluster`.

    Args:
        name: of the experiment; resuming finds it by this name under the storage.
        run: the run folder that every trial starts from, or a config file of which one is made.
        out: where the merged results go; a run folder of searches for one device, otherwise a
            folder of such.
        storage: where Ray keeps checkpoints and results: an absolute path, shared by the nodes
            where there are several, or a URI such as ``s3://bucket/folder``.
        cpus: processors of a trial, or of each worker of a training by several.
        gpus: of the same.
        max_concurrent: trials at the same time; 0 for as many as fit.
        max_failures: how often a trial is taken up again after its process or node has died.
        checkpoint_s: seconds between checkpoints; what is younger is done again after a kill.
        search: the searches.
        training: the trainings, in place of searches.

    Raises:
        UserError: for a value that cannot be.
    """

    name: str
    run: str
    out: str
    storage: str
    cpus: float = 1.0
    gpus: float = 0.0
    max_concurrent: int = 0
    max_failures: int = 3
    checkpoint_s: float = 30.0
    search: SearchGrid | None = None
    training: TrainingGrid | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"name={self.name!r} cannot name a folder; take letters, digits, '.', '_' and '-'"
            )
        if (self.search is None) == (self.training is None):
            raise UserError(
                "a job is either searches or trainings; give exactly one of the sections "
                "[search] and [training]"
            )
        if not (URI.fullmatch(self.storage) or Path(self.storage).expanduser().is_absolute()):
            raise UserError(
                f"storage={self.storage!r} is relative, and means another folder on every node; "
                "give an absolute path that all nodes share, or a URI such as s3://bucket/folder"
            )
        if self.cpus <= 0 or self.gpus < 0:
            raise UserError(f"cpus={self.cpus:g}, gpus={self.gpus:g}; a trial needs a processor")
        check_numbers("max_concurrent", (self.max_concurrent,), 0)
        check_numbers("max_failures", (self.max_failures,), -1)

    @property
    def storage_path(self) -> str:
        """The storage as Ray takes it."""
        if URI.fullmatch(self.storage):
            return self.storage.rstrip("/")
        return str(Path(self.storage).expanduser())

    @property
    def experiment_path(self) -> str:
        """Where the experiment lies in the storage."""
        return f"{self.storage_path}/{self.name}"


def load_job(path: str | Path) -> JobConfig:
    """Read a job file.

    Raises:
        UserError: when it is absent or no TOML, or a key or value is wrong.
    """
    return job_of(read_toml(Path(path), "job file"))


def job_of(values: Mapping[str, Any]) -> JobConfig:
    """Build a job from nested mappings.

    Raises:
        UserError: for an unknown or missing key, or a value that cannot be.
    """
    for key in ("name", "run", "out", "storage"):
        if key not in values:
            raise UserError(f"the job lacks {key!r}; name, run, out and storage are needed")
    job: JobConfig = build_config(JobConfig, values)
    return job
