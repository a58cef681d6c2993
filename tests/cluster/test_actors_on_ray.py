"""Evaluation on real actors: a Ray of this process, and a cluster whose nodes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from nas.cluster.actors import Evaluate
from nas.cluster.connection import connect
from nas.cluster.evaluator import ActorSearch
from nas.cluster.pool import MAX_DEATHS, ActorPool
from nas.progress import Reporter
from nas.study import SearchRun, evaluated, sqlite_url, studies_at
from nas.study.owners import OWNER
from searchspace.arch import Arch
from searchspace.errors import UserError
from tests.cluster.actor_search import run
from tests.cluster.local_cluster import ROOT, STORE_BYTES, local_cluster, ray_environment
from tests.nas.search_process import loss_of, problem

pytestmark = pytest.mark.cluster
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with ray_environment(), connect("local", num_cpus=2, object_store_memory=STORE_BYTES):
        yield


def ray_processes() -> list[str]:
    """Commands of running processes that belong to Ray and were started by this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().replace("\0", " ")
            environment = (folder / "environ").read_text(errors="replace")
        except OSError:
            continue
        if os.environ.get("RAY_AUTH_TOKEN", "no token") in environment and "ray" in command:
            found.append(command)
    return found


def lines(folder: Path) -> list[list[str]]:
    path = folder / "log.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_nothing_is_left_of_a_ray_that_was_started_here() -> None:
    import ray

    with ray_environment():
        before = dict(os.environ)
        handler = signal.getsignal(signal.SIGTERM)
        with connect("local", num_cpus=1, object_store_memory=STORE_BYTES):
            assert ray.is_initialized() and ray_processes()
            with connect("local"):
                assert ray.is_initialized()
            assert ray.is_initialized(), "a connection that was there is not ours to close"
        assert not ray.is_initialized()
        until = time.monotonic() + 10
        while ray_processes() and time.monotonic() < until:
            time.sleep(0.1)
        assert not ray_processes()
        assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("sampler", ["nsga2", "predictor"])
def test_one_actor_evaluates_what_one_process_does(
    local_ray: None, tmp_path: Path, sampler: str
) -> None:
    (tmp_path / "alone").mkdir()
    alone = SearchRun(problem(), sqlite_url(tmp_path / "alone"), sampler, seed=0)
    alone.run(12, 1e9, QUIET)
    on_ray = run(tmp_path, 12, sampler, num_actors=1)
    archs = [[item.arch for item in evaluated(search.study)] for search in (alone, on_ray)]
    assert archs[0] == archs[1] and len(archs[0]) == 12
    assert len({pid for _, pid, _ in lines(tmp_path)} - {str(os.getpid())}) == 1


def test_an_actor_that_is_killed_is_replaced_and_its_arch_evaluated_once_more(
    local_ray: None, tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill_one() -> bool:
        found = lines(tmp_path)
        if not killed and len(found) >= 4 and found[-1][0] == "start":
            os.kill(int(found[-1][1]), signal.SIGKILL)
            killed.append(found[-1][2])
        return False

    search = run(tmp_path, 8, "random", num_actors=1, should_stop=kill_one)
    starts = Counter(arch_id for word, _, arch_id in lines(tmp_path) if word == "start")
    assert {arch_id: n for arch_id, n in starts.items() if n > 1} == {killed[0]: 2}
    assert search.num_evaluations == len(evaluated(search.study)) == 8
    assert len({pid for _, pid, _ in lines(tmp_path)}) == 2, "the actor was not replaced"


def deadly(folder: Path) -> Evaluate:
    """The largest arch ends the process that evaluates it."""
    largest = problem().space.largest().id

    def evaluate(arch: Arch) -> float:
        if arch.id == largest:
            with (folder / "deaths.txt").open("a") as log:
                log.write("x")
            os._exit(1)
        return loss_of(arch)

    return evaluate


def raising(folder: Path) -> Evaluate:
    def evaluate(arch: Arch) -> float:
        raise TypeError("a fault")

    return evaluate


def not_built(folder: Path) -> Evaluate:
    raise ModuleNotFoundError("No module named 'hwnas_parts'")


def search_with(build: Callable[[Path], Evaluate], folder: Path, num: int) -> SearchRun:
    import ray

    search = SearchRun(problem(), sqlite_url(folder), "random", seed=0)
    pool: ActorPool[int] = ActorPool(build, ray.put(folder), num_wanted=lambda: 2, cpus=0.5)
    try:
        ActorSearch(search, pool, num).run(1e9, QUIET)
    finally:
        pool.stop()
    return search


def test_an_arch_that_kills_actors_fails_in_the_end(local_ray: None, tmp_path: Path) -> None:
    search = search_with(deadly, tmp_path, 6)
    assert (tmp_path / "deaths.txt").read_text() == "x" * MAX_DEATHS
    assert search.num_evaluations == 6 and len(evaluated(search.study)) == 5
    failed = [t for t in search.study.trials if t.state == TrialState.FAIL]
    assert failed[0].user_attrs["reason"].startswith("3 actors died of it")


def test_faults_of_the_program_and_of_the_node_are_told(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a fault"):
        search_with(raising, tmp_path, 4)
    with pytest.raises(UserError, match=r"hwnas_parts.*install hwnas on every node"):
        search_with(not_built, tmp_path, 4)


def test_a_cluster_without_room_is_waited_for_and_then_given_up(
    local_ray: None, tmp_path: Path
) -> None:
    import ray

    said: list[str] = []
    search = SearchRun(problem(), sqlite_url(tmp_path), "random", seed=0)
    pool: ActorPool[int] = ActorPool(
        raising, ray.put(tmp_path), num_wanted=lambda: 1, cpus=64, patience_s=6.0, say=said.append
    )
    with pytest.raises(UserError, match="no node of the cluster had room for an actor of 64 CPUs"):
        ActorSearch(search, pool, 4).run(1e9, QUIET)
    pool.stop()
    assert said == ["search: waiting for a node with room for an actor of 64 CPUs, up to 6 s"]
    assert search.num_evaluations == 0


def start_head(folder: Path, address: str, num: int) -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("actor_search.py")
    command = [sys.executable, str(program), str(folder), address, str(num)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for(folder: Path, num_lines: int, head: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while len(lines(folder)) < num_lines:
        assert head.poll() is None and time.monotonic() < until, "the search ended too early"
        time.sleep(0.02)


def test_a_node_is_killed_and_then_the_head_and_the_same_command_ends_the_search(
    tmp_path: Path,
) -> None:
    num = 40
    nodes: list[dict[str, Any]] = [{"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}]
    with local_cluster(nodes) as cluster:
        head = start_head(tmp_path, cluster.address, num)
        wait_for(tmp_path, 20, head)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        wait_for(tmp_path, len(lines(tmp_path)) + 12, head)
        head.kill()
        head.wait()
        begun = len(lines(tmp_path))
        assert begun < 2 * num
        head = start_head(tmp_path, cluster.address, num)
        try:
            assert head.wait(timeout=120) == 0
        finally:
            head.kill()
    (study,) = studies_at(sqlite_url(tmp_path))
    items = evaluated(study)
    assert len(items) == num, "not the number asked for"
    assert all(item.values[0] == loss_of(item.arch) for item in items)
    real = [t for t in study.trials if t.state == TrialState.COMPLETE and "seconds" in t.user_attrs]
    assert len({t.user_attrs["arch_id"] for t in real}) == len(real) == num, "one was done twice"
    assert len({t.user_attrs[OWNER]["process"] for t in real}) == 2, "a head had no part"
    states = Counter(trial.state for trial in study.trials)
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    # Only what was under way when the node or the head was killed was begun again.
    starts = Counter(arch_id for word, _, arch_id in lines(tmp_path) if word == "start")
    assert sum(count - 1 for count in starts.values()) <= 2 + 4


def test_a_wrong_token_is_told_from_an_absent_cluster() -> None:
    program = (
        "import sys\n"
        "from nas.cluster.connection import connect\n"
        "from searchspace.errors import UserError\n"
        "try:\n"
        "    with connect(sys.argv[1]): print('let in')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    with local_cluster([{"num_cpus": 1}]) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", program, cluster.address],
            env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "as it does with a wrong or missing token; run `ray get-auth-token" in done.stdout
    assert len(done.stdout.splitlines()) == 1
