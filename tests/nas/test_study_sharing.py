"""Several processes on one study: claims, signs of life, and real processes, one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from nas.pareto import hypervolume, normalise
from nas.progress import Reporter
from nas.study import Evaluated, SearchProblem, SearchRun, evaluated, sqlite_url, studies_at
from nas.study.claims import Claims
from nas.study.owners import (
    OWNER,
    OwningSampler,
    Watch,
    _start_of,
    at_work,
    heartbeats,
    is_gone,
    new_owner,
)
from searchspace.arch import Arch
from tests.nas.search_process import loss_of, problem

QUIET = Reporter(quiet=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base() -> SearchProblem:
    return problem()


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(sampler=OwningSampler(optuna.samplers.RandomSampler(seed=0)))


def test_an_owner_is_gone_when_its_process_is() -> None:
    owner = new_owner()
    assert is_gone(owner)
    with at_work(owner):
        assert not is_gone(owner)
    with subprocess.Popen(["sleep", "60"]) as other:
        alive = {**owner, "process": other.pid, "started": _start_of(other.pid)}
        assert is_gone(alive) is False
        assert is_gone({**alive, "started": "another time"})
        other.kill()
    assert is_gone(alive)
    assert is_gone({**alive, "host": "elsewhere"}) is None
    assert is_gone(None) is None


def test_an_owner_on_another_machine_expires_without_a_heartbeat(study: optuna.Study) -> None:
    trial = study.ask()
    trial.set_user_attr(OWNER, {"host": "elsewhere", "process": 1, "started": "", "search": ""})
    watch = Watch(expiry_s=0.2)
    claims = Claims(study, watch)
    with heartbeats(study, lambda: [trial._trial_id], interval_s=0.02):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert len(claims.look()[1]) == 1, "it was given up while it was alive"
            time.sleep(0.02)
    assert len(claims.look()[1]) == 1, "its last sign of life may be new"
    time.sleep(0.3)
    assert claims.look()[1] == []
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["reason"] == "interrupted: its process is gone"


def claim_now(study: optuna.Study, arch_id: str, limit: int | None = None) -> tuple[str, int]:
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    outcome = Claims(study).claim(trial.number, trial._trial_id, arch_id, limit)
    return outcome.result, trial.number


def test_a_candidate_under_way_or_done_is_not_claimed_again(study: optuna.Study) -> None:
    with at_work(study.sampler.owner):  # type: ignore[union-attr]
        assert claim_now(study, "a") == ("mine", 0)
        assert claim_now(study, "a") == ("taken", 1)
        study.tell(1, state=TrialState.FAIL)
        assert claim_now(study, "b") == ("mine", 2)
        study.tell(0, 1.0)
        assert claim_now(study, "a") == ("known", 3)


def test_no_more_are_claimed_than_wanted(study: optuna.Study) -> None:
    with at_work(study.sampler.owner):  # type: ignore[union-attr]
        assert claim_now(study, "a", limit=2)[0] == "mine"
        assert claim_now(study, "b", limit=2)[0] == "mine"
        assert not Claims(study).has_place(2)
        assert claim_now(study, "c", limit=2) == ("full", 2)
        study.tell(2, state=TrialState.FAIL)
        # What a gone process was at work on makes room.
        study._storage.set_trial_user_attr(1, OWNER, {**new_owner(), "search": "ended"})
        assert Claims(study).has_place(2)
        assert study.trials[1].state == TrialState.FAIL
        assert study.trials[-1].state == TrialState.WAITING
        assert study.trials[-1].system_attrs["fixed_params"] == study.trials[1].params


def test_of_two_that_propose_the_same_at_once_the_first_evaluates(
    base: SearchProblem, tmp_path: Path
) -> None:
    """Both write before either looks: the worst case, forced by a barrier."""
    url = f"journal:{tmp_path / 'study.log'}"
    runs = [SearchRun(base, url, "random", seed=0) for _ in range(2)]
    barrier = threading.Barrier(2)
    results: list[str] = []
    params = runs[0].params_of(base.space.smallest())

    def take_part(run: SearchRun) -> None:
        trial = run.study.ask()
        trial.set_user_attr("arch_id", "same")
        barrier.wait()
        with at_work(run._sampler.owner):
            outcome = run.claims.claim(trial.number, trial._trial_id, "same", None)
            results.append(outcome.result)
            if outcome.result == "taken":
                run.claims.end(trial._trial_id, "another was first")
            barrier.wait()

    for run in runs:
        run.study.enqueue_trial(params)
    with at_work(runs[0]._sampler.owner), at_work(runs[1]._sampler.owner):
        threads = [threading.Thread(target=take_part, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == ["mine", "taken"]


def test_one_that_was_taken_for_dead_does_not_count_twice(
    base: SearchProblem, tmp_path: Path
) -> None:
    asked: list[str] = []

    def evaluate(arch: Arch) -> float:
        asked.append(arch.id)
        if len(asked) == 1:
            # Another process gives this one up in the middle of its evaluation.
            (running,) = slow.study.get_trials(states=(TrialState.RUNNING,))
            slow.claims.requeue(running, "its process is gone")
            other.run(1, 1e9, QUIET)
        return 1.0

    patient = SearchProblem(base.space, base.prices, base.objectives, evaluate, seeds=base.seeds)
    slow = SearchRun(patient, sqlite_url(tmp_path), "random", seed=0)
    other = SearchRun(patient, sqlite_url(tmp_path), "random", seed=0)
    assert slow.step() == "withdrawn"
    assert asked == [base.space.largest().id] * 2
    states = Counter(trial.state for trial in slow.study.trials)
    assert states[TrialState.COMPLETE] == 1 and states[TrialState.RUNNING] == 0
    assert slow.num_evaluations == 1


@pytest.mark.parametrize("with_loss", [False, True])
def test_what_a_process_had_found_out_when_it_was_killed_is_kept(
    base: SearchProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_loss: bool
) -> None:
    """Killed between the evaluation and its last word: told by the next, or evaluated again."""
    asked: list[str] = []
    problem = with_log(base, asked)
    first = SearchRun(problem, sqlite_url(tmp_path), "random", seed=0)
    monkeypatch.setattr(first.claims, "requeue", lambda trial, reason: None)

    def die(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    part = "tell" if with_loss else "_complete"
    monkeypatch.setattr(first.study if with_loss else first, part, die)
    with pytest.raises(KeyboardInterrupt):
        first.step()
    second = SearchRun(problem, sqlite_url(tmp_path), "random", seed=0)
    second.run(2, 1e9, QUIET)
    assert len(evaluated(second.study)) == 2
    assert len(asked) == (2 if with_loss else 3) and len(set(asked)) == 2
    values = {item.arch.id: item.values for item in evaluated(second.study)}
    arch = base.space.largest()
    metrics = base.exact_metrics(arch)
    expected = (loss_of(arch), metrics["latency_ms"], metrics["weight_bytes"])
    assert values[arch.id] == pytest.approx(expected)


def with_log(base: SearchProblem, asked: list[str]) -> SearchProblem:
    def evaluate(arch: Arch) -> float:
        asked.append(arch.id)
        return loss_of(arch)

    return SearchProblem(base.space, base.prices, base.objectives, evaluate, seeds=base.seeds)


def start(folder: Path, storage: str, sampler: str, num: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    program = Path(__file__).with_name("search_process.py")
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), storage, sampler, str(num)], env=environment
    )


def lines(folder: Path) -> list[list[str]]:
    path = folder / "log.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kill_in_an_evaluation(
    processes: list[subprocess.Popen[bytes]], folder: Path, after: int
) -> tuple[int, str]:
    """SIGKILL the first process that is seen evaluating after some lines; return it and its arch.

    Whether it was really in the middle is checked once it is dead: a line may have come meanwhile.
    """
    victim: subprocess.Popen[bytes] | None = None
    while victim is None:
        assert any(process.poll() is None for process in processes), "the search ended too early"
        found = lines(folder)
        last = {int(pid): word for word, pid, _ in found}
        busy = [p for p in processes if last.get(p.pid) == "start" and p.poll() is None]
        victim = busy[0] if len(found) >= after and busy else None
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    *_, (word, _, arch_id) = [line for line in lines(folder) if int(line[1]) == victim.pid]
    return victim.pid, arch_id if word == "start" else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_url", "sampler", "num"),
    [
        (sqlite_url, "random", 40),
        (lambda folder: f"journal:{folder / 'study.log'}", "random", 24),
        (sqlite_url, "predictor", 80),
    ],
    ids=["sqlite-random", "journal-random", "sqlite-predictor"],
)
def test_four_processes_one_killed_lose_and_double_nothing(
    make_url: Callable[[Path], str], sampler: str, num: int, base: SearchProblem, tmp_path: Path
) -> None:
    storage = make_url(tmp_path)
    processes = [start(tmp_path, storage, sampler, num) for _ in range(4)]
    try:
        victim, interrupted = kill_in_an_evaluation(processes, tmp_path, after=num // 2)
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(codes) == [-signal.SIGKILL, 0, 0, 0]

    ends = Counter(arch_id for word, _, arch_id in lines(tmp_path) if word == "end")
    starts = Counter(arch_id for word, _, arch_id in lines(tmp_path) if word == "start")
    repeated = {arch_id for arch_id, count in starts.items() if count > 1}
    assert repeated <= {interrupted}, "an arch was evaluated twice"
    assert len({pid for _, pid, _ in lines(tmp_path)}) == 4, "a process had no part"

    (study,) = studies_at(storage)
    items = evaluated(study)
    assert len(items) == num, "not the number asked for"
    assert {item.arch.id for item in items} == set(ends), "an evaluation was lost"
    real = [t for t in study.trials if t.state == TrialState.COMPLETE and "seconds" in t.user_attrs]
    assert len(real) == num
    assert all(item.values[0] == loss_of(item.arch) for item in items)
    if interrupted:
        (lost,) = [t for t in study.trials if "process is gone" in t.user_attrs.get("reason", "")]
        assert lost.user_attrs[OWNER]["process"] == victim
        assert lost.user_attrs["arch_id"] == interrupted
        assert ends[interrupted] == 1
    if sampler == "predictor":
        compare_with_one_process(base, items, tmp_path, num)


def compare_with_one_process(
    base: SearchProblem, items: list[Evaluated], folder: Path, num: int
) -> None:
    """The front of four processes is worth that of one, within what seeds differ by."""
    fronts = [np.array([item.values for item in items])]
    for seed in (0, 1):
        alone = folder / f"alone{seed}"
        alone.mkdir()
        run = SearchRun(base, sqlite_url(alone), "predictor", seed=seed)
        run.run(num, 1e9, QUIET)
        fronts.append(np.array([item.values for item in evaluated(run.study)]))
    every = np.vstack(fronts)
    low, high = every.min(axis=0), every.max(axis=0)
    shared, *single = [
        hypervolume(normalise(front, low, high), np.full(3, 1.1)) for front in fronts
    ]
    assert shared >= 0.98 * min(single)
