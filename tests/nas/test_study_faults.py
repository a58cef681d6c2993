"""What a search keeps when evaluations, processes or the storage fail."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from nas.candidates import Objectives
from nas.evaluation import EvaluationFailed
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun, adopt, sqlite_url
from nas.study.owners import OWNER
from searchspace.arch import Arch
from searchspace.errors import UserError
from tests.nas.search_process import loss_of, problem

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def base() -> SearchProblem:
    return problem()


def search(what: SearchProblem, storage: str, num: int) -> SearchRun:
    run = SearchRun(what, storage, "random", seed=0)
    run.run(num, 1e9, QUIET)
    return run


def refuse(arch: Arch) -> float:
    raise AssertionError(f"{arch.id} was evaluated again")


def test_failures_keep_their_reason_and_are_not_tried_again(
    base: SearchProblem, tmp_path: Path
) -> None:
    def evaluate(arch: Arch) -> float:
        raise EvaluationFailed("the loss is nan")

    objectives = [
        Objectives.parse(("loss", name), (), base.prices.metrics)
        for name in ("latency_ms", "params")
    ]
    failing = replace(base, objectives=objectives[0], evaluate=evaluate)
    run = SearchRun(failing, sqlite_url(tmp_path), "random", seed=0)
    assert run.step() == "failed"
    params = run.study.trials[0].params
    again = SearchRun(
        replace(base, objectives=objectives[1], evaluate=refuse),
        sqlite_url(tmp_path),
        "random",
        0,
    )
    assert again.num_evaluations == 1
    again.study.enqueue_trial(params)
    assert again.step() == "duplicate"
    reasons = [t.user_attrs["reason"] for t in again.study.get_trials(states=(TrialState.FAIL,))]
    assert reasons == ["the loss is nan"] * 2


def test_a_success_takes_the_place_of_a_failure(base: SearchProblem, tmp_path: Path) -> None:
    def evaluate(arch: Arch) -> float:
        raise EvaluationFailed("out of memory")

    urls = [sqlite_url(tmp_path / name) for name in ("a", "b")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    failed = SearchRun(replace(base, evaluate=evaluate), urls[0], "random", seed=0)
    assert failed.step() == "failed"
    run = search(base, urls[1], 1)
    adopt(failed.study, run.study, base.objectives)
    adopt(failed.study, run.study, base.objectives)
    assert len(failed.study.trials) == 2 and failed.losses == run.losses


def test_a_fault_of_the_program_is_shown_and_the_next_command_gets_past_it(
    base: SearchProblem, tmp_path: Path
) -> None:
    def evaluate(arch: Arch) -> float:
        if arch == base.space.largest():
            raise ZeroDivisionError("a bug")
        return loss_of(arch)

    faulty = replace(base, evaluate=evaluate)
    with pytest.raises(ZeroDivisionError):
        search(faulty, sqlite_url(tmp_path), 2)
    run = search(faulty, sqlite_url(tmp_path), 2)
    (failed,) = run.study.get_trials(states=(TrialState.FAIL,))
    assert failed.user_attrs["reason"] == "ZeroDivisionError: a bug"
    assert run.num_evaluations == 2 and len(run.losses) == 1


def test_a_search_where_nothing_can_be_evaluated_ends_early(
    base: SearchProblem, tmp_path: Path
) -> None:
    def evaluate(arch: Arch) -> float:
        raise EvaluationFailed("the loss is nan")

    with pytest.raises(UserError, match=r"each of the 25 .* failed, the last with: the loss is"):
        search(replace(base, evaluate=evaluate), sqlite_url(tmp_path), 100)


def test_a_storage_that_is_lost_is_one_sentence(base: SearchProblem, tmp_path: Path) -> None:
    def evaluate(arch: Arch) -> float:
        (tmp_path / "study.db").write_bytes(b"overwritten" * 1000)
        (tmp_path / "study.db-wal").unlink()
        return loss_of(arch)

    with pytest.raises(UserError, match=r"does not answer any more: .*the same command goes on"):
        search(replace(base, evaluate=evaluate), sqlite_url(tmp_path), 3)


def test_a_candidate_from_the_queue_survives_two_kills(base: SearchProblem, tmp_path: Path) -> None:
    """The second one between leaving the queue and having parameters."""
    run = SearchRun(base, sqlite_url(tmp_path), "random", seed=0)
    (queued,) = run.study.trials
    popped = run.study._pop_waiting_trial_id()
    assert popped == queued._trial_id
    run.study._storage.set_trial_user_attr(popped, OWNER, run._sampler.owner)
    again = SearchRun(base, sqlite_url(tmp_path), "random", seed=0)
    again.run(1, 1e9, QUIET)
    assert list(again.losses) == [base.space.largest().id]
    assert again.study.trials[0].user_attrs["reason"].endswith("queued again")


def test_the_days_between_a_kill_and_the_next_command_are_not_spent(
    base: SearchProblem, tmp_path: Path
) -> None:
    long_ago = datetime.now() - timedelta(days=2)
    run = SearchRun(base, sqlite_url(tmp_path), "random", seed=0)
    assert run.step() == "complete"
    spent = run.seconds
    assert 0 < spent < 60
    for attrs in (
        {"reason": "interrupted: its process is gone; queued again"},
        {"told_late": True, "seconds": 3.0},
    ):
        trial = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attrs)
        trial.datetime_start = long_ago
        trial.datetime_complete = datetime.now() - timedelta(days=1)
        run.study.add_trial(trial)
    assert run.seconds == pytest.approx(spent + 3.0, abs=0.1)
