"""The search: an Optuna study as the archive of everything that was really evaluated.

The study lives in an SQLite file of the run folder, or at any Optuna storage URL. Kill the process
at any point and run the same command again: finished evaluations are read back, the one that was
interrupted is queued again.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from nas.candidates import Objectives, Prices, SpaceCodec, metrics_of
from nas.evaluation import EvaluationFailed
from nas.pareto import hypervolume, non_dominated, normalise
from nas.progress import Reporter
from nas.samplers import make_sampler
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace

STUDY_NAME = "search"
MAX_REJECTED = 2000


@dataclass(frozen=True)
class SearchProblem:
    """What is searched.

    Args:
        space: the archs there are.
        prices: their exact costs.
        objectives: what is minimised, under which limits.
        evaluate: the held-out loss of an arch; raises `EvaluationFailed` with a reason.
        scores: a training-free score of genotypes for the predictor, or None.
        seeds: archs to evaluate first.
    """

    space: SearchSpace
    prices: Prices
    objectives: Objectives
    evaluate: Callable[[Arch], float]
    scores: Any = None
    seeds: tuple[Arch, ...] = ()


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return a space's genes as Optuna distributions."""
    return {name: CategoricalDistribution(choices) for name, choices in space.genes.items()}


def open_study(storage: str, objectives: Objectives, sampler: Any = None) -> Study:
    """Create or reopen the study.

    Args:
        storage: an Optuna storage URL.
        objectives: named directions, all minimised.
        sampler: an Optuna sampler.

    Raises:
        UserError: when the storage cannot be opened or holds other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        backend = optuna.storages.RDBStorage(storage)
        _make_sqlite_fast(backend)
        study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=backend,
            sampler=sampler,
            directions=["minimize"] * len(objectives.names),
            load_if_exists=True,
        )
    except Exception as error:
        if type(error).__module__.startswith(("sqlalchemy", "sqlite3", "optuna")):
            raise UserError(f"cannot open the study at {storage}: {error}") from error
        raise
    if len(study.directions) != len(objectives.names) or (
        study.metric_names not in (None, list(objectives.names))
    ):
        raise UserError(
            f"the study at {storage} minimises {study.metric_names}, this search minimises "
            f"{list(objectives.names)}; choose another run folder"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives.names))
    return study


def _make_sqlite_fast(backend: Any) -> None:
    """Let SQLite commit without waiting for the disk; a killed process still loses nothing."""
    if backend.engine.dialect.name != "sqlite":
        return
    from sqlalchemy import event

    def on_connect(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(backend.engine, "connect", on_connect)
    backend.engine.dispose()


def sqlite_url(folder: Path) -> str:
    """Return the storage URL of a run folder's own study."""
    return f"sqlite:///{folder / 'study.db'}"


class SearchRun:
    """One search: asks a sampler, evaluates, tells.

    Args:
        problem: what is searched.
        storage: an Optuna storage URL.
        sampler: a name in `nas.samplers.SAMPLERS`.
        seed: of the sampler.
        population: for evolutionary samplers.

    Raises:
        UserError: when no arch keeps the constraints, or the study is another one.
    """

    def __init__(
        self, problem: SearchProblem, storage: str, sampler: str, seed: int, population: int = 32
    ) -> None:
        self.problem = problem
        self.space = problem.space
        codec = SpaceCodec(self.space, problem.prices, problem.objectives, problem.scores)
        self._check_seeds_and_limits(codec)
        options: dict[str, Any] = {}
        if sampler == "predictor":
            options = {
                "codec": codec,
                "search_space": distributions(self.space),
                "seed_params": [self._params(arch) for arch in self.seeds],
            }
        elif sampler == "nsga2":
            options = {"population_size": population}
        self.study = open_study(
            storage, problem.objectives, make_sampler(sampler, seed=seed, **options)
        )
        if not self.study.trials and sampler != "predictor":
            for arch in self.seeds:
                self.study.enqueue_trial(self._params(arch))
        self._requeue_interrupted()
        self.losses: dict[str, float] = {
            trial.user_attrs["arch_id"]: trial.user_attrs["loss"]
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        }

    def _check_seeds_and_limits(self, codec: SpaceCodec) -> None:
        start = codec.feasible_start
        seeds = [
            arch
            for arch in self.problem.seeds
            if (codec.constraints(self.space.encode(arch)[None]) <= 0).all()
        ]
        self.seeds = seeds or [self.space.decode(start[0])]

    def _params(self, arch: Arch) -> dict[str, Any]:
        return self.space.to_params(self.space.encode(arch)[None])[0]

    def _requeue_interrupted(self) -> None:
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = Trial(self.study, frozen._trial_id)
            trial.set_user_attr("reason", "interrupted; queued again")
            self.study.tell(frozen.number, state=TrialState.FAIL)
            if frozen.params:
                self.study.enqueue_trial(frozen.params, skip_if_exists=False)

    @property
    def num_evaluations(self) -> int:
        """Evaluations done, failed ones included, repeated archs not."""
        return len(self.losses) + sum(
            "seconds" in trial.user_attrs
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        )

    @property
    def seconds(self) -> float:
        """Seconds spent on all trials so far, over all processes."""
        return sum(
            trial.duration.total_seconds()
            for trial in self.study.get_trials(deepcopy=False)
            if trial.duration is not None
        )

    def run(self, num_evaluations: int | None, budget_s: float, reporter: Reporter) -> None:
        """Evaluate until there are `num_evaluations`, or until `budget_s` seconds are spent."""
        spent = self.seconds
        start = time.perf_counter()
        rejected, done = 0, self.num_evaluations
        with reporter.bar("search") as bar:
            while True:
                elapsed = spent + time.perf_counter() - start
                share = elapsed / budget_s if num_evaluations is None else done / num_evaluations
                if share >= 1.0:
                    break
                result = self.step()
                rejected = rejected + 1 if result == "rejected" else 0
                done += result in ("complete", "failed")
                if rejected > MAX_REJECTED:
                    raise UserError(
                        f"{MAX_REJECTED} candidates in a row broke a constraint; use "
                        "search.sampler='predictor', which never proposes such, or loosen it"
                    )
                bar.update(share, f"{done} evaluated, best loss {self.best_loss():.3f}")

    def step(self) -> str:
        """Evaluate one candidate; return complete, duplicate, rejected or failed."""
        trial = self.study.ask(distributions(self.space))
        genotype = self.space.canonical(self.space.to_genotypes([trial.params]))[0]
        arch = self.space.decode(genotype)
        trial.set_user_attr("arch_id", arch.id)
        trial.set_user_attr("arch", arch.to_dict())
        metrics = dict(metrics_of(self.problem.prices, genotype))
        trial.set_user_attr("metrics", metrics)
        broken = [
            c for c in self.problem.objectives.exact_constraints if metrics[c.metric] > c.limit
        ]
        if broken:
            return self._fail(trial, f"{broken[0].metric}={metrics[broken[0].metric]:.4g} breaks "
                              f"{broken[0]}", "rejected")  # fmt: skip
        known = self.losses.get(arch.id)
        if known is not None:
            self._complete(trial, {**metrics, "loss": known})
            return "duplicate"
        start = time.perf_counter()
        try:
            metrics["loss"] = self.problem.evaluate(arch)
        except EvaluationFailed as error:
            trial.set_user_attr("seconds", time.perf_counter() - start)
            return self._fail(trial, str(error), "failed")
        trial.set_user_attr("seconds", time.perf_counter() - start)
        self._complete(trial, metrics)
        self.losses[arch.id] = metrics["loss"]
        return "complete"

    def _complete(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        for constraint in self.problem.objectives.constraints:
            trial.set_constraint(str(constraint), metrics[constraint.metric] - constraint.limit)
        trial.set_user_attr("loss", metrics["loss"])
        self.study.tell(trial, [metrics[name] for name in self.problem.objectives.names])

    def _fail(self, trial: Trial, reason: str, result: str) -> str:
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        return result

    def best_loss(self) -> float:
        """Return the lowest loss so far; NaN before the first."""
        return min(self.losses.values(), default=math.nan)


@dataclass(frozen=True)
class Evaluated:
    """One evaluated candidate."""

    arch: Arch
    values: tuple[float, ...]
    feasible: bool


def evaluated(study: Study) -> list[Evaluated]:
    """Return every different completed candidate, in order."""
    found: dict[str, Evaluated] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        feasible = all(value <= 0 for value in trial.constraints.values())
        item = Evaluated(
            Arch.from_dict(trial.user_attrs["arch"]), tuple(trial.values or ()), feasible
        )
        found.setdefault(item.arch.id, item)
    return list(found.values())


def search_summary(study: Study, objectives: Objectives, sampler: str) -> dict[str, Any]:
    """Return what the report shows of a search: trials and hypervolume over evaluations.

    The hypervolume is of all feasible candidates so far, every objective scaled to 0..1 over all
    candidates of the search, with reference point 1.1.
    """
    trials = [_trial_row(trial, objectives) for trial in study.get_trials(deepcopy=False)]
    items = evaluated(study)
    values = np.array([item.values for item in items if item.feasible], dtype=np.float64)
    volumes: list[float] = []
    if len(values):
        scaled = normalise(values, values.min(axis=0), values.max(axis=0))
        reference = np.full(values.shape[1], 1.1)
        for count in range(1, len(scaled) + 1):
            part = scaled[:count]
            volumes.append(float(hypervolume(part[non_dominated(part)], reference)))
    return {
        "sampler": sampler,
        "objectives": list(objectives.names),
        "constraints": [str(constraint) for constraint in objectives.constraints],
        "trials": trials,
        "hypervolume": volumes,
    }


def _trial_row(trial: FrozenTrial, objectives: Objectives) -> dict[str, Any]:
    complete = trial.state == TrialState.COMPLETE
    values = dict(zip(objectives.names, trial.values or (), strict=True)) if complete else {}
    return {
        "number": trial.number,
        "arch_id": trial.user_attrs.get("arch_id"),
        "state": "complete" if complete else "failed",
        "values": values,
        "reason": trial.user_attrs.get("reason"),
        "seconds": trial.user_attrs.get("seconds", 0.0),
    }
