"""What a study knows, recomputed from its trials: candidates, front, hypervolume, the nearest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nas.candidates import Objectives, excess_of, shown
from nas.pareto import hypervolume, non_dominated, normalise
from nas.study.generations import evaluations, studies_at
from searchspace.arch import Arch

Floats = NDArray[np.float64]
REFERENCE = 1.1
"""Reference point of the hypervolume, with every objective scaled to 0..1 over the candidates."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluated candidate."""

    arch: Arch
    values: tuple[float, ...]
    feasible: bool


def evaluated(study: Study) -> list[Evaluated]:
    """Return every different completed candidate, in order."""
    return [
        Evaluated(
            Arch.from_dict(trial.user_attrs["arch"]), tuple(trial.values), _is_feasible(trial)
        )
        for trial in _completed(study)
    ]


def read_evaluated(storage: str, names: Sequence[str]) -> list[Evaluated]:
    """Return every different arch that a run has evaluated, under whatever objectives.

    Nothing is written, and constraints are not looked at.

    Args:
        storage: an Optuna storage URL, as `open_study` takes it.
        names: metrics that become the values; ``loss`` and whatever the trials hold.

    Raises:
        UserError: when the storage cannot be opened.
    """
    found: dict[str, Evaluated] = {}
    for study in studies_at(storage):
        for trial in _completed(study):
            metrics = _metrics(trial)
            if all(metric in metrics for metric in names):
                arch = Arch.from_dict(trial.user_attrs["arch"])
                values = tuple(metrics[metric] for metric in names)
                found.setdefault(arch.id, Evaluated(arch, values, True))
    return list(found.values())


@dataclass(frozen=True)
class Snapshot:
    """Where a search stands.

    Args:
        names: of the objectives.
        num_evaluated: different archs, failed ones included.
        num_failed: how many of them failed.
        front: objective values of the feasible non-dominated archs by arch id, sorted by the
            first objective.
        hypervolume: of the front, every objective scaled to 0..1 over all feasible archs so far,
            so it can only be compared within one snapshot.
        best: the lowest first objective, of feasible archs; NaN before there is one.
    """

    names: tuple[str, ...]
    num_evaluated: int
    num_failed: int
    front: tuple[tuple[str, tuple[float, ...]], ...]
    hypervolume: float
    best: float


def snapshot(study: Study, objectives: Objectives) -> Snapshot:
    """Return where a search stands."""
    trials = list(evaluations(study.get_trials(deepcopy=False)))
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    feasible = [trial for trial in complete if _is_feasible(trial)]
    names = objectives.names
    num_failed = len(trials) - len(complete)
    if not feasible:
        return Snapshot(names, len(trials), num_failed, (), 0.0, math.nan)
    values = np.array([trial.values for trial in feasible], dtype=np.float64)
    rows = np.flatnonzero(non_dominated(values))
    rows = rows[values[rows, 0].argsort(kind="stable")]
    front = tuple((str(feasible[r].user_attrs["arch_id"]), tuple(values[r])) for r in rows)
    volume = _volume(scaled(values)[rows])
    return Snapshot(names, len(trials), num_failed, front, volume, float(values[:, 0].min()))


def nearest(study: Study, objectives: Objectives) -> dict[str, Any] | None:
    """Return what comes nearest to the constraints when nothing that was evaluated keeps them.

    Returns:
        None when an arch keeps them all, or nothing is evaluated. Otherwise ``arch_id`` and
        ``metrics`` of the arch whose worst excess, in shares of the limits, is smallest; and for
        each constraint that it breaks ``lowest``, the lowest value of that metric in the study.
    """
    trials = _completed(study)
    constraints = objectives.constraints
    if not trials or not constraints:
        return None
    values = np.array(
        [[_metrics(trial)[c.metric] for c in constraints] for trial in trials], dtype=np.float64
    )
    worst = excess_of(constraints, values).max(axis=1)
    if worst.min() <= 0:
        return None
    best = int(worst.argmin())
    broken = [i for i, c in enumerate(constraints) if values[best, i] > c.limit]
    return {
        "arch_id": trials[best].user_attrs["arch_id"],
        "metrics": {c.metric: float(v) for c, v in zip(constraints, values[best], strict=True)},
        "broken": [str(constraints[i]) for i in broken],
        "lowest": {constraints[i].metric: float(values[:, i].min()) for i in broken},
    }


def nearest_sentence(found: Mapping[str, Any], num_evaluated: int) -> str:
    """Say what `nearest` found."""
    values = ", ".join(f"{name}={shown(value)}" for name, value in found["metrics"].items())
    lowest = ", ".join(f"{name}={shown(value)}" for name, value in found["lowest"].items())
    return (
        f"none of {num_evaluated} evaluated archs keeps every constraint; the nearest is "
        f"{found['arch_id']} with {values}, which breaks {' and '.join(found['broken'])}; the "
        f"lowest that any arch reached is {lowest}; loosen the constraint or search longer"
    )


def search_summary(study: Study, objectives: Objectives, sampler: str) -> dict[str, Any]:
    """Return what the report shows of a search: trials and hypervolume over evaluations.

    The hypervolume is of all feasible candidates so far, every objective scaled to 0..1 over all
    feasible candidates of the search.
    """
    trials = study.get_trials(deepcopy=False)
    feasible = [trial for trial in _completed(study) if _is_feasible(trial)]
    return {
        "sampler": sampler,
        "objectives": list(objectives.names),
        "constraints": [str(constraint) for constraint in objectives.constraints],
        "trials": [_row(t, objectives) for t in trials if t.state.is_finished()],
        "hypervolume": _volumes([trial.values for trial in feasible]),
        "reference": [REFERENCE] * len(objectives.names),
        "nearest": _nearest_in_words(study, objectives),
    }


def _nearest_in_words(study: Study, objectives: Objectives) -> dict[str, Any] | None:
    found = nearest(study, objectives)
    if found is None:
        return None
    return {**found, "sentence": nearest_sentence(found, len(_completed(study)))}


def scaled(values: Floats) -> Floats:
    """Scale every objective of candidates (N, M) to 0..1."""
    return normalise(values, values.min(axis=0), values.max(axis=0))


def _volumes(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the hypervolume after each candidate; computed only where it changes."""
    if not values:
        return []
    unit = scaled(np.array(values, dtype=np.float64))
    volumes: list[float] = []
    front = unit[:0]
    for row in unit:
        if volumes and (front <= row).all(axis=1).any():
            volumes.append(volumes[-1])
            continue
        front = np.vstack([front[~(row <= front).all(axis=1)], row])
        volumes.append(_volume(front))
    return volumes


def _volume(front: Floats) -> float:
    return float(hypervolume(front, np.full(front.shape[1], REFERENCE)))


def _completed(study: Study) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return list(evaluations(trials))


def _is_feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def _metrics(trial: FrozenTrial) -> dict[str, float]:
    return {**trial.user_attrs["metrics"], "loss": trial.user_attrs["loss"]}


def _row(trial: FrozenTrial, objectives: Objectives) -> dict[str, Any]:
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
