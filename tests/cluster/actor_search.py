"""One head of a search on actors, for the tests: ``python actor_search.py FOLDER ADDRESS N``.

The loss is made up; every evaluation leaves a line in FOLDER/log.txt at its start and at its end,
with the process that ran it, from which the test sees what was evaluated how often and where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from nas.cluster.actors import Evaluate
from nas.cluster.connection import connect
from nas.cluster.evaluator import ActorSearch
from nas.cluster.pool import ActorPool
from nas.progress import Reporter
from nas.study import SearchRun, sqlite_url
from tests.nas.search_process import problem

CPUS = 0.5


def build(folder: Path) -> Evaluate:
    """What an actor makes of its content."""
    return problem(folder).evaluate


def run(
    folder: Path,
    num: int,
    sampler: str,
    num_actors: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> SearchRun:
    """Search until N archs are evaluated, on the Ray that is connected."""
    import ray

    search = SearchRun(problem(), sqlite_url(folder), sampler, seed=0)
    pool: ActorPool[int] = ActorPool(
        build, ray.put(folder), num_wanted=lambda: num_actors, cpus=CPUS, patience_s=60.0
    )
    try:
        ahead = 0 if num_actors == 1 else 1
        ActorSearch(search, pool, num, ahead).run(1e9, Reporter(quiet=True), should_stop)
    finally:
        pool.stop()
    return search


def main() -> None:
    """Take the head's part until N archs are evaluated."""
    folder, address, num = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with connect(address):
        run(folder, num, "random", 4)


if __name__ == "__main__":
    main()
