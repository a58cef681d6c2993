"""One study per set of objectives and constraints, all in one storage, that share evaluations.

Optuna fixes the number of objectives when a study is made. What was evaluated stays valid when an
objective or a constraint is added: a trial holds its loss and every cost, so its values under
other objectives are computed, and it teaches the sampler of the new study too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.candidates import Objectives
from nas.study._same import check_same, remember
from nas.study.storage import (
    cannot_open,
    is_of_the_database,
    open_storage,
    split_storage,
)
from searchspace.arch import Arch
from searchspace.errors import UserError

PROBLEM = "problem"
LOSS = "loss"
INTERRUPTED = "interrupted"
"""How the reason begins of a trial that ended before its evaluation did."""

SUCCESS_AFTER_FAILURE = (TrialState.FAIL, TrialState.COMPLETE)

Price = Callable[[Arch], Mapping[str, float]]


def open_study(
    storage: str,
    objectives: Objectives,
    sampler: Any = None,
    *,
    space: str = "",
    weights: str = "",
    price: Price | None = None,
) -> Study:
    """Create or reopen the study of these objectives and constraints.

    It starts with everything that the storage's studies of the same name but other objectives or
    constraints have evaluated.

    Args:
        storage: an Optuna storage URL, see `open_storage`; ``URL#NAME`` names the study.
        objectives: what is minimised, under which limits.
        sampler: an Optuna sampler.
        space: says which space the archs are of, see `space_key`; empty for any.
        weights: says which supernet the losses are of, see `weights_key`; empty for any.
        price: the exact costs of an arch, for objectives that a trial does not hold.

    Raises:
        UserError: when the storage cannot be opened, or holds archs of another space or losses
            of other weights.
    """
    url, name = split_storage(storage)
    backend = open_storage(url)
    try:
        others = _studies_in(backend, name)
        check_same(others, url, space, weights)
        study = optuna.create_study(
            study_name=_name_of(backend, name, objectives),
            storage=backend,
            sampler=sampler,
            directions=["minimize"] * len(objectives.names),
            load_if_exists=True,
        )
        _describe(study, objectives)
        remember(study, space, weights)
        for other in others:
            if other.study_name != study.study_name:
                adopt(study, other, objectives, price)
    except Exception as error:
        if is_of_the_database(error):
            raise cannot_open(url, error) from error
        raise
    return study


def names_in(backend: optuna.storages.BaseStorage, name: str) -> list[str]:
    """Return the names of a run's studies, one for each set of objectives and constraints."""
    names = optuna.get_all_study_names(backend)
    return [found for found in names if found == name or found.startswith(f"{name}: ")]


def studies_at(storage: str) -> list[Study]:
    """Return a run's studies, of whatever objectives; there may be none.

    Raises:
        UserError: when the storage cannot be opened.
    """
    url, name = split_storage(storage)
    return _studies_in(open_storage(url), name)


def _studies_in(backend: optuna.storages.BaseStorage, name: str) -> list[Study]:
    found = names_in(backend, name)
    return [optuna.load_study(study_name=item, storage=backend) for item in found]


def adopt(
    study: Study, source: Study, objectives: Objectives, price: Price | None = None
) -> tuple[int, int]:
    """Copy what another study has evaluated, with the values of these objectives.

    Failed evaluations keep their reason. Archs that the study has already are left out, but for
    successes where it has a failure; so doing it again changes nothing.

    Args:
        study: gets the trials.
        source: the study that has them.
        objectives: of `study`.
        price: the exact costs of an arch; without it those that the trials hold are taken.

    Returns:
        How many archs were copied, and how many were there already.

    Raises:
        UserError: when a trial lacks an objective and `price` is not given.
    """
    present = evaluations(study.get_trials(deepcopy=False))
    known = {trial.user_attrs["arch_id"]: trial.state for trial in present}
    before, found = len(known), 0
    for trial in evaluations(source.get_trials(deepcopy=False)):
        found += 1
        state = known.setdefault(trial.user_attrs["arch_id"], TrialState.WAITING)
        # A success is worth more than a failure of the same arch, maybe for lack of memory.
        if state == TrialState.WAITING or (state, trial.state) == SUCCESS_AFTER_FAILURE:
            known[trial.user_attrs["arch_id"]] = trial.state
            study.add_trial(_translated(trial, objectives, price))
    copied = len(known) - before
    return copied, found - copied


def evaluations(trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Yield one finished trial per arch that was really evaluated, failed ones included.

    A success counts before a failure of the same arch.
    """
    seen: set[str] = set()
    for state in (TrialState.COMPLETE, TrialState.FAIL):
        for trial in trials:
            arch_id = trial.user_attrs.get("arch_id")
            if trial.state != state or arch_id is None or arch_id in seen:
                continue
            if state == TrialState.FAIL and not _failed(trial):
                continue
            seen.add(arch_id)
            yield trial


def _failed(trial: FrozenTrial) -> bool:
    """Whether a failed trial is a failed evaluation, and none that was rejected or cut off."""
    attrs = trial.user_attrs
    return "seconds" in attrs and not str(attrs.get("reason", "")).startswith(INTERRUPTED)


def _translated(trial: FrozenTrial, objectives: Objectives, price: Price | None) -> FrozenTrial:
    attrs = dict(trial.user_attrs)
    metrics = dict(attrs.get("metrics", {}))
    if price is not None:
        metrics |= price(Arch.from_dict(attrs["arch"]))
    attrs["metrics"] = {key: value for key, value in metrics.items() if key != "loss"}
    parts: dict[str, Any] = {"state": trial.state}
    if trial.state == TrialState.COMPLETE:
        metrics["loss"] = attrs["loss"]
        if lacking := sorted(_needed(objectives) - set(metrics)):
            raise UserError(
                f"the evaluation of arch {attrs['arch_id']} holds no {lacking[0]}; run `nas "
                "search` with these objectives first"
            )
        parts["values"] = [metrics[name] for name in objectives.names]
        parts["constraints"] = {str(c): metrics[c.metric] - c.limit for c in objectives.constraints}
    copy = create_trial(
        params=trial.params, distributions=trial.distributions, user_attrs=attrs, **parts
    )
    copy.datetime_start, copy.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copy


def _problem(objectives: Objectives) -> dict[str, list[str]]:
    return {
        "objectives": list(objectives.names),
        "constraints": sorted(str(c) for c in objectives.constraints),
    }


def _name_of(backend: optuna.storages.BaseStorage, name: str, objectives: Objectives) -> str:
    """The first study has the plain name; each of other objectives or constraints adds them."""
    wanted = _problem(objectives)
    if name not in names_in(backend, name):
        return name
    first = optuna.load_study(study_name=name, storage=backend)
    stored = first.user_attrs.get(PROBLEM)
    if (
        stored is None
        and first.metric_names in (None, wanted["objectives"])
        and len(first.directions) == len(wanted["objectives"])
    ):
        # Made by an older release, which had one study only, or by a process that was killed.
        return name
    if stored == wanted:
        return name
    return f"{name}: {', '.join((*wanted['objectives'], *wanted['constraints']))}"


def _describe(study: Study, objectives: Objectives) -> None:
    """Write down what the study is of, for the next command and for optuna-dashboard."""
    if study.user_attrs.get(PROBLEM) != _problem(objectives):
        study.set_user_attr(PROBLEM, _problem(objectives))
    if study.metric_names != list(objectives.names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives.names))


def _needed(objectives: Objectives) -> set[str]:
    return {*objectives.names, *(c.metric for c in objectives.constraints)}
