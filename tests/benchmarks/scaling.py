"""How a search scales with actors: throughput, the cost of one evaluation, where the head ends.

    python -m tests.benchmarks.scaling

Three parts. `actors`: real actors on the local Ray whose evaluation sleeps for so many seconds,
through the same loop, sampler and study as a search. `overhead`: an evaluation that takes no time,
what Ray adds to it, and what the head spends on sampler and study. `simulated`: the same loop with
any number of actors in simulated time; what the head does is done, and takes its processor time
(so that other programs do not count), only the sleeping of the actors is not waited for.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nas.cluster.actors import Answer, Evaluate
from nas.cluster.connection import connect
from nas.cluster.evaluator import ActorSearch
from nas.cluster.pool import ActorPool
from nas.progress import Reporter
from nas.study import SearchRun, sqlite_url
from searchspace.arch import Arch
from tests.nas.search_process import loss_of, problem

QUIET = Reporter(quiet=True)
NO_BUDGET_S = 1e9


def sleeper(seconds: float) -> Evaluate:
    """What an actor makes of the number of seconds: an evaluation that takes so long."""

    def evaluate(arch: Arch) -> float:
        time.sleep(seconds)
        return loss_of(arch)

    return evaluate


class SimulatedPool(ActorPool[int]):
    """Actors in simulated time: this process's processor time, and the waiting that is skipped."""

    def __init__(self, num_actors: int, seconds: float) -> None:
        self._seconds, self._free = seconds, num_actors
        self._num_actors = num_actors
        self._events: list[tuple[float, int]] = []
        self._skipped_s = 0.0
        self.answered: list[float] = []

    @property
    def num_ready(self) -> int:
        """All of them."""
        return self._num_actors

    @property
    def num_free(self) -> int:
        """Those that do not sleep."""
        return self._free

    def now(self) -> float:
        """Return the simulated time, in seconds."""
        return time.process_time() + self._skipped_s

    def submit(self, key: int, arch: Mapping[str, Any]) -> None:
        """Let an actor begin to sleep."""
        self._free -= 1
        heapq.heappush(self._events, (self.now() + self._seconds, key))

    def wait(self, timeout_s: float) -> list[tuple[int, Answer]]:
        """Return what has come, after the time until then has been skipped."""
        if not self._events:
            return []
        self._skipped_s += max(0.0, min(self._events[0][0] - self.now(), timeout_s))
        answers = []
        while self._events and self._events[0][0] <= self.now():
            answers.append((heapq.heappop(self._events)[1], Answer(1.0, "", self._seconds)))
        self._free += len(answers)
        self.answered += [self.now()] * len(answers)
        return answers


def new_search(folder: str, options: argparse.Namespace) -> SearchRun:
    """Return a new search, with a study of its own."""
    url = sqlite_url(Path(folder))
    if options.storage == "journal":
        url = f"journal:{folder}/study.log"
    return SearchRun(problem(), url, options.sampler, seed=0)


def throughput(num_actors: int, options: argparse.Namespace) -> dict[str, float]:
    """Return evaluations per second of real actors, counted from when all of them are ready."""
    import ray

    num = num_actors * options.evals
    with tempfile.TemporaryDirectory() as folder:
        search = new_search(folder, options)
        pool: ActorPool[int] = ActorPool(
            sleeper,
            ray.put(options.seconds),
            num_wanted=lambda: num_actors,
            cpus=options.cpus,
        )
        try:
            while pool.num_ready < num_actors:
                pool.wait(1.0)
            start = time.perf_counter()
            ActorSearch(search, pool, num, int(num_actors > 1)).run(NO_BUDGET_S, QUIET)
            elapsed_s = time.perf_counter() - start
        finally:
            pool.stop()
        assert search.num_evaluations == num
    return {
        "actors": num_actors,
        "evaluations": num,
        "per_second": num / elapsed_s,
        "efficiency": num * options.seconds / num_actors / elapsed_s,
    }


def overhead(options: argparse.Namespace) -> dict[str, float]:
    """Return what Ray adds to an evaluation, in ms: from the arch to its answer, one at a time."""
    import ray

    pool: ActorPool[int] = ActorPool(sleeper, ray.put(0.0), num_wanted=lambda: 1, cpus=options.cpus)
    arch = problem().space.largest().to_dict()
    times_ms = []
    try:
        while not pool.num_ready:
            pool.wait(1.0)
        for key in range(options.calls):
            start = time.perf_counter()
            pool.submit(key, arch)
            ((_, answer),) = pool.wait(60.0)
            times_ms.append((time.perf_counter() - start - answer.seconds) * 1e3)
    finally:
        pool.stop()
    return {
        "calls": options.calls,
        "mean_ms": float(np.mean(times_ms)),
        "median_ms": float(np.median(times_ms)),
        "p95_ms": float(np.percentile(times_ms, 95)),
    }


def simulated(num_actors: int, seconds: float, options: argparse.Namespace) -> dict[str, float]:
    """Return evaluations per second in simulated time, over whole rounds of all actors.

    The first round is left out: in it the actors have just been given their first archs.
    """
    rounds = max(1, -(-options.simulated_evals // num_actors))
    num = num_actors * (rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        search = new_search(folder, options)
        pool = SimulatedPool(num_actors, seconds)
        start = time.process_time()
        ActorSearch(search, pool, num, int(num_actors > 1)).run(NO_BUDGET_S, QUIET)
        head_s = time.process_time() - start
        assert search.num_evaluations == num
    per_second = (num - num_actors) / (pool.answered[num - 1] - pool.answered[num_actors - 1])
    return {
        "actors": num_actors,
        "seconds": seconds,
        "head_ms": head_s / num * 1e3,
        "per_second": per_second,
        "efficiency": per_second * seconds / num_actors,
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the three parts."""
    found: dict[str, Any] = {"sampler": options.sampler, "storage": options.storage}
    found["saturation"] = {}
    most = max(options.actors, default=1)
    store = {"object_store_memory": 150 << 20, "num_cpus": max(2, int(most * options.cpus) + 1)}
    with connect("local", **store):
        found["overhead"] = overhead(options)
        found["actors"] = [throughput(number, options) for number in options.actors]
    found["simulated"] = [
        simulated(number, seconds, options)
        for seconds in options.simulated_seconds
        for number in options.simulated
    ]
    for seconds in options.simulated_seconds if options.simulated else ():
        rows = [row for row in found["simulated"] if row["seconds"] == seconds]
        found["saturation"][f"{seconds:g}"] = saturation(rows, seconds)
    return found


def saturation(rows: list[dict[str, float]], seconds: float) -> float:
    """Return the actors that the head keeps busy: its throughput at its busiest, times the time."""
    return max(row["per_second"] for row in rows) * seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--actors", type=int, nargs="*", default=[1, 2, 4])
    add("--seconds", type=float, default=1.0, help="of one evaluation by a real actor")
    add("--evals", type=int, default=20, help="evaluations of each real actor")
    add("--cpus", type=float, default=0.25, help="CPUs an actor reserves: sleeping needs none")
    add("--calls", type=int, default=300, help="evaluations that overhead is measured over")
    add("--simulated", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1000])
    add("--simulated-seconds", type=float, nargs="*", default=[1.0, 60.0])
    add("--simulated-evals", type=int, default=100, help="at least, after the first round")
    add("--sampler", default="random")
    add("--storage", choices=("sqlite", "journal"), default="sqlite")
    add("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    title = f"sampler {found['sampler']}, study in {found['storage']}"
    real = Table("actors", "evaluations", "per second", "efficiency", title=title)
    for row in found["actors"]:
        per_second, efficiency = f"{row['per_second']:.3f}", f"{row['efficiency']:.1%}"
        real.add_row(str(row["actors"]), str(row["evaluations"]), per_second, efficiency)
    console.print(real)
    times = found["overhead"]
    console.print(
        f"Ray adds to one evaluation: {times['mean_ms']:.2f} ms (median {times['median_ms']:.2f}, "
        f"95% of {times['calls']} below {times['p95_ms']:.2f})"
    )
    columns = ("seconds", "actors", "per second", "efficiency", "head ms per evaluation")
    virtual = Table(*columns, title="simulated actors, real head")
    for row in found["simulated"]:
        virtual.add_row(
            f"{row['seconds']:g}", str(row["actors"]), f"{row['per_second']:.2f}",
            f"{row['efficiency']:.1%}", f"{row['head_ms']:.1f}",
        )  # fmt: skip
    console.print(virtual)
    for seconds, number in found["saturation"].items():
        console.print(f"with evaluations of {seconds} s the head kept {number:.0f} actors busy")


if __name__ == "__main__":
    main()
