"""Evaluation on actors, without Ray: the loop over a made-up pool, what is sent and refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

from nas.calibration import calibrated_view
from nas.cli import build_parser
from nas.cluster.actors import Answer, Evaluator, Facts
from nas.cluster.config import RayConfig
from nas.cluster.connection import _kept_as_it_was, connect, resolved
from nas.cluster.evaluator import ActorSearch
from nas.cluster.pool import ActorPool
from nas.cluster.search import check_actor, num_cpus_here
from nas.cluster.shipment import Array, packed, unpacked
from nas.cluster.versions import versions_here
from nas.config import load_config
from nas.evaluation import EvaluationFailed, held_out_loss
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun, evaluated, sqlite_url
from nas.tasks import TaskConfig, prepare_task
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.nas.search_process import loss_of, problem

QUIET = Reporter(quiet=True)
NO_BUDGET_S = 1e9


class MadeUpPool(ActorPool[int]):
    """Actors in this process: the newest work is done first, so that answers are out of order."""

    def __init__(self, num_actors: int, evaluate: Callable[[Arch], float] = loss_of) -> None:
        self._num, self._evaluate = num_actors, evaluate
        self.work: list[tuple[int, Mapping[str, Any]]] = []
        self.done: list[str] = []
        self.most = 0

    @property
    def num_ready(self) -> int:
        return self._num

    @property
    def num_free(self) -> int:
        return self._num - len(self.work)

    def submit(self, key: int, arch: Mapping[str, Any]) -> None:
        assert self.num_free > 0
        self.work.append((key, arch))
        self.most = max(self.most, len(self.work))

    def wait(self, timeout_s: float) -> list[tuple[int, Answer]]:
        if not timeout_s:
            return []
        key, values = self.work.pop()
        arch = Arch.from_dict(values)
        self.done.append(arch.id)
        try:
            return [(key, Answer(self._evaluate(arch), "", 0.1))]
        except EvaluationFailed as error:
            return [(key, Answer(None, str(error), 0.1))]


@pytest.fixture(scope="module")
def base() -> SearchProblem:
    return problem()


def search_in(folder: Path, base: SearchProblem, sampler: str = "random") -> SearchRun:
    return SearchRun(base, sqlite_url(folder), sampler, seed=0, population=8)


def archs_of(run: SearchRun) -> list[str]:
    return [item.arch.id for item in evaluated(run.study)]


@pytest.mark.parametrize("sampler", ["random", "nsga2", "predictor"])
def test_one_actor_evaluates_what_one_process_does(
    base: SearchProblem, tmp_path: Path, sampler: str
) -> None:
    (tmp_path / "alone").mkdir()
    alone = search_in(tmp_path / "alone", base, sampler)
    num = 12
    alone.run(num, NO_BUDGET_S, QUIET)
    (tmp_path / "actor").mkdir()
    search = search_in(tmp_path / "actor", base, sampler)
    pool = MadeUpPool(1)
    ActorSearch(search, pool, num).run(NO_BUDGET_S, QUIET)
    assert pool.done == archs_of(search) == archs_of(alone)
    values = [item.values for item in evaluated(search.study)]
    assert values == [item.values for item in evaluated(alone.study)]


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_many_actors_are_kept_busy_and_nothing_is_done_twice(
    base: SearchProblem, tmp_path: Path, num_ahead: int
) -> None:
    search, pool = search_in(tmp_path, base), MadeUpPool(4)
    ActorSearch(search, pool, 16, num_ahead).run(NO_BUDGET_S, QUIET)
    assert pool.most == 4
    assert len(pool.done) == len(set(pool.done)) == search.num_evaluations == 16
    assert set(archs_of(search)) == set(pool.done)
    states = Counter(trial.state for trial in search.study.trials)
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    ActorSearch(search, pool, 16).run(NO_BUDGET_S, QUIET)
    assert len(pool.done) == 16, "a finished search went on"


def test_a_failed_evaluation_is_a_failed_trial_with_its_reason(
    base: SearchProblem, tmp_path: Path
) -> None:
    def evaluate(arch: Arch) -> float:
        if arch.id == base.space.largest().id:
            raise EvaluationFailed("out of memory")
        return loss_of(arch)

    search, pool = search_in(tmp_path, base), MadeUpPool(2, evaluate)
    ActorSearch(search, pool, 5).run(NO_BUDGET_S, QUIET)
    assert search.num_evaluations == 5 and len(evaluated(search.study)) == 4
    (failed,) = [t for t in search.study.trials if t.state == TrialState.FAIL]
    assert failed.user_attrs["reason"] == "out of memory"


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("no node")])
def test_what_is_under_way_when_the_search_stops_is_queued_again(
    base: SearchProblem, tmp_path: Path, error: Any
) -> None:
    search, pool = search_in(tmp_path, base), MadeUpPool(3)
    wait, left = pool.wait, [6]

    def stopping(timeout_s: float) -> list[tuple[int, Answer]]:
        left[0] -= bool(timeout_s)
        if not left[0]:
            raise error
        return wait(timeout_s)

    pool.wait = stopping  # type: ignore[method-assign]
    with pytest.raises(BaseException, match=r"no node|^$"):
        ActorSearch(search, pool, 12).run(NO_BUDGET_S, QUIET)
    assert len(pool.done) == search.num_evaluations == 5
    under_way = {Arch.from_dict(arch).id for _, arch in pool.work}
    queued = {t.user_attrs["queued_arch_id"] for t in search.study.trials
              if t.state == TrialState.WAITING}  # fmt: skip
    assert under_way <= queued
    again, pool = search_in(tmp_path, base), MadeUpPool(3)
    ActorSearch(again, pool, 12).run(NO_BUDGET_S, QUIET)
    assert again.num_evaluations == 12 and len(pool.done) == 7
    assert under_way <= set(archs_of(again))


def test_a_fault_of_the_program_ends_the_search_and_the_next_one_gets_past_it(
    base: SearchProblem, tmp_path: Path
) -> None:
    search, pool = search_in(tmp_path, base), MadeUpPool(2)
    fault = Answer(None, "TypeError: no", 0.1, TypeError("no"))

    def raising(timeout_s: float) -> list[tuple[int, Answer]]:
        return [(pool.work.pop()[0], fault)] if timeout_s else []

    pool.wait = raising  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="no"):
        ActorSearch(search, pool, 6).run(NO_BUDGET_S, QUIET)
    failed = [t for t in search.study.trials if t.state == TrialState.FAIL]
    assert "TypeError: no" in [trial.user_attrs["reason"] for trial in failed]
    again = search_in(tmp_path, base)
    ActorSearch(again, MadeUpPool(2), 6).run(NO_BUDGET_S, QUIET)
    assert again.num_evaluations == 6 and len(evaluated(again.study)) == 5


def test_seconds_bound_a_search_without_a_number(base: SearchProblem, tmp_path: Path) -> None:
    search, pool = search_in(tmp_path, base), MadeUpPool(2)
    ActorSearch(search, pool, None).run(0.5, QUIET)
    assert 2 <= len(pool.done) == search.num_evaluations
    assert not [t for t in search.study.trials if t.state == TrialState.RUNNING]


@pytest.mark.parametrize("norm", [("rmsnorm",), ("prepbn", "layernorm")])
def test_an_actor_computes_the_same_losses(norm: tuple[str, ...]) -> None:
    task = prepare_task(TaskConfig("copy", num_items=8), Path("unused"))
    space = SearchSpace.load("decoder-tiny", task.vocab_size, dict(task.family_facts))
    space = dataclasses.replace(space, norm=norm)
    supernet = Supernet(space, torch.Generator().manual_seed(3))
    batches = task.evaluation_batches("validation", 200, 4)
    shipment = packed(supernet, task, batches)
    evaluate = unpacked(shipment)
    for arch in (space.largest(), space.smallest()):
        expected = held_out_loss(calibrated_view(supernet, arch, task), batches, task)
        assert evaluate(arch) == expected
    shared = next(iter(shipment.weights.values()))
    assert shared.tensor().data_ptr() == shared.data.ctypes.data, "the weights were copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 5)])
def test_tensors_survive_the_way(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    there = Array.of(tensor).tensor()
    assert there.dtype == dtype and there.shape == tensor.shape and torch.equal(there, tensor)


def test_other_versions_are_refused_with_the_node_and_what_differs() -> None:
    here = versions_here()
    check_actor(here, Facts("a (10.0.0.1)", 7, here))
    with pytest.raises(
        UserError, match=r"node b \(10\.0\.0\.2\) has torch 1\.0 instead of 2\."
    ) as e:
        check_actor(here, Facts("b (10.0.0.2)", 7, {**here, "torch": "1.0"}))
    assert "python" not in str(e.value)


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """Something that listens and is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            stream, _ = listening.accept()
            with stream:
                stream.recv(100)
                stream.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_no_cluster_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
    assert f"no Ray cluster answers at {closed} (Connection refused)" in refusal(closed)
    assert "no Ray cluster answers at no-such-host" in refusal("no-such-host.invalid:6379")
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert f"what answers at {address} is no Ray cluster" in refusal(address)


def refusal(address: str) -> str:
    with pytest.raises(UserError) as error, connect(address):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("run.toml", "CONFIG goes before --ray"),
        ("ray://head:10001", "Ray client"),
        ("h:x", "is no"),
    ],
)
def test_what_is_no_address(address: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RayConfig(address)


def test_the_address_of_a_submitted_job_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resolved(None) == resolved("") == resolved("local") == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolved(None) == resolved("local") == "10.0.0.1:6379"
    assert resolved("10.0.0.2:6379") == "10.0.0.2:6379" and resolved("auto") == "auto"


def test_what_ray_changes_in_this_process_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    with _kept_as_it_was():
        os.environ["PYTHONPATH"] = os.environ["RAY_AUTH_MODE"] = "other"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert os.environ["PYTHONPATH"] == "mine" and "RAY_AUTH_MODE" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is handler


def config_of(*arguments: str) -> RayConfig:
    from nas._search_options import search_values

    values = search_values(build_parser().parse_args(["search", "run.toml", *arguments]))
    return load_config(None, (), **values).ray


def test_options_stand_for_keys_of_the_config() -> None:
    assert config_of() == RayConfig()
    assert config_of("--ray") == RayConfig("local")
    assert config_of("--ray", "head:6379", "--workers", "3") == RayConfig("head:6379", actors=3)
    assert config_of("--ray", "auto", "--devices", "a, b-1").devices == ("a", "b-1")
    with pytest.raises(UserError, match=r"ray\.goal"):
        RayConfig(goal="best")
    with pytest.raises(UserError, match="no device's name"):
        RayConfig(devices=("a b",))


def test_a_ray_that_is_started_here_has_room_for_the_actors_asked_for() -> None:
    assert num_cpus_here(RayConfig("local", actors=400, cpus=0.5)) == 200
    assert RayConfig(cpus=0.25).num_threads == 1 and RayConfig(cpus=2.5).num_threads == 2


def test_an_evaluator_tells_a_failure_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.cluster.actors.node_here", lambda: "here")

    def build(reason: str) -> Callable[[Arch], float]:
        def evaluate(arch: Arch) -> float:
            if reason:
                raise EvaluationFailed(reason)
            return 1.5

        return evaluate

    arch = problem().space.smallest().to_dict()
    evaluator = Evaluator(build, "", 1)
    assert evaluator.hello() == Facts("here", os.getpid(), versions_here())
    assert evaluator.evaluate(arch).loss == 1.5
    failed = Evaluator(build, "too big", 1).evaluate(arch)
    assert failed.loss is None and failed.reason == "too big" and failed.fault is None
