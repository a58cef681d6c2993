"""The storage that knows its own trials: the same as Optuna's own, and cheap for many of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nas.study.own_trials import OwnTrialsStorage, together
from nas.study.storage import open_storage, sqlite_url

SPACE = {
    "kind": CategoricalDistribution(["a", "b", 3]),
    "rate": FloatDistribution(1e-3, 1.0, log=True),
    "width": IntDistribution(2, 64, step=2),
}


def study_at(folder: Path, seed: int = 0) -> Study:
    return optuna.create_study(
        study_name="s", storage=open_storage(sqlite_url(folder)), directions=["minimize"] * 2,
        sampler=optuna.samplers.RandomSampler(seed=seed), load_if_exists=True,
    )  # fmt: skip


def plain_view(folder: Path) -> list[FrozenTrial]:
    """What Optuna's own storage reads."""
    study = optuna.load_study(study_name="s", storage=sqlite_url(folder))
    return study.get_trials()


def facts(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "params": trial.params,
        "distributions": trial.distributions,
        "values": trial.values if trial.state == TrialState.COMPLETE else None,
        "user": trial.user_attrs,
        "constraints": trial.constraints,
        "start": trial.datetime_start,
    }


def test_it_shows_what_optuna_reads(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    study.enqueue_trial({"kind": 3, "rate": 0.5, "width": 8}, {"queued": "x"})
    trials = [study.ask(SPACE) for _ in range(5)]
    for index, trial in enumerate(trials):
        with together(study._storage, trial._trial_id):
            trial.set_user_attr("facts", {"n": index, "deep": [1, {"a": 2.5}]})
            trial.set_constraint("limit", index - 1.0)
    study.tell(trials[1], [1.0, float("inf")])
    study.tell(trials[2], state=TrialState.FAIL)
    shown = [facts(trial) for trial in study.get_trials(deepcopy=False)]
    assert shown == [facts(trial) for trial in plain_view(tmp_path)]
    assert [s["state"].name for s in shown] == ["RUNNING", "COMPLETE", "FAIL", *["RUNNING"] * 2]
    assert shown[0]["params"] == {"kind": 3, "rate": 0.5, "width": 8}
    ended = study.get_trials()[1]
    (read,) = [t for t in plain_view(tmp_path) if t.number == 1]
    assert ended.datetime_complete is not None and read.datetime_complete is not None
    assert abs((ended.datetime_complete - read.datetime_complete).total_seconds()) < 5


def test_two_processes_see_each_other(tmp_path: Path) -> None:
    one, two = study_at(tmp_path, 0), study_at(tmp_path, 1)
    mine, theirs = one.ask(SPACE), two.ask(SPACE)
    theirs.set_user_attr("says", 1)
    assert one.get_trials()[1].user_attrs == {"says": 1}
    assert one.get_trials()[1].params == theirs.params
    theirs.set_user_attr("says", 2)
    assert one.get_trials()[1].user_attrs == {"says": 2}, "a change of another's was missed"
    two.tell(theirs, [1.0, 2.0])
    assert one.get_trials()[1].values == [1.0, 2.0]
    third = two.ask(SPACE)
    mine.set_user_attr("says", 3)
    one.tell(mine, [0.0, 0.0])
    assert [t.state.name for t in two.get_trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert two.get_trials()[0].user_attrs == {"says": 3}
    assert len(one.get_trials()) == 3 and third.number == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda study, trial: trial.set_user_attr("says", 1),
        lambda study, trial: trial.set_constraint("limit", 1.0),
        lambda study, trial: study._storage.set_trial_state_values(
            trial._trial_id, TrialState.COMPLETE, [1.0, 1.0]
        ),
    ],
)
def test_a_trial_that_another_process_ended_is_given_up(
    tmp_path: Path, write: Callable[[Study, Any], None]
) -> None:
    mine, other = study_at(tmp_path), study_at(tmp_path, 1)
    trial = mine.ask(SPACE)
    trial.set_user_attr("owner", "me")
    other._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        write(mine, trial)
    assert mine.get_trials()[0].state == TrialState.FAIL
    assert mine.get_trials()[0].user_attrs == {"owner": "me"}


def test_nothing_of_a_killed_process_is_half_there(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    study.ask(SPACE)  # Optuna's first trial of a study writes each parameter on its own
    trial = study.ask(SPACE)
    assert plain_view(tmp_path)[1].params == {}
    trial.set_user_attr("arch_id", "x")
    assert plain_view(tmp_path)[1].params == trial.params


def test_own_trials_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_at(tmp_path)
    storage = study._storage
    assert isinstance(storage, OwnTrialsStorage)
    trials = [study.ask(SPACE) for _ in range(12)]
    for trial in trials:
        trial.set_user_attr("arch_id", "x")
    study.get_trials()
    read: list[int] = []
    original = storage._backend._build_frozen_trial_from_trial_model

    def counting(trial: Any) -> FrozenTrial:
        read.append(trial.trial_id)
        return original(trial)

    monkeypatch.setattr(storage._backend, "_build_frozen_trial_from_trial_model", counting)
    for trial in trials[:6]:
        study.tell(trial, [1.0, 2.0])
        study.ask(SPACE).set_user_attr("arch_id", "x")
        assert len(study.get_trials()) >= 12
    assert len(read) <= 6, "each look read trials that this process works on"
    assert [facts(t) for t in study.get_trials()] == [facts(t) for t in plain_view(tmp_path)]
