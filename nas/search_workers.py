"""Several processes on one study, started and watched by one command."""

from __future__ import annotations

import contextlib
import functools
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hw_profiles.process import child_environment, usable_processors
from nas.pipeline import Pipeline
from nas.search_stage import join_search
from nas.search_view import search_view
from nas.study import SearchRun, snapshot
from searchspace.errors import UserError

POLL_S = 0.2
GRACE_S = 20.0


@dataclass(frozen=True)
class Worker:
    """One process that evaluates.

    Args:
        index: counts from 0.
        process: of the operating system.
        log: what it says.
    """

    index: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_words(self) -> str:
        """The last line that it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it wrote nothing to {self.log}"


def run_workers(pipeline: Pipeline, budget_s: float) -> SearchRun:
    """Search with `search.workers` processes; show the front meanwhile.

    A worker that is killed takes nothing with it: what it was at work on is evaluated by another.

    Args:
        pipeline: the run.
        budget_s: seconds, where no number of evaluations is given.

    Raises:
        UserError: when every worker ended before the search was done.
    """
    config = pipeline.config.search
    search = join_search(pipeline)
    spent, start = search.seconds, time.perf_counter()
    limit = config.num_evaluations
    if limit is not None and search.num_evaluations >= limit:
        return search
    workers: list[Worker] = []
    try:
        for index in range(config.workers):
            workers.append(_start(pipeline.folder.path, index, config.workers, budget_s))
        with search_view(pipeline.reporter.quiet) as view:
            look = functools.partial(snapshot, search.study, pipeline.objectives)
            gone: set[int] = set()
            while len(gone) < len(workers):
                elapsed = spent + time.perf_counter() - start
                share = elapsed / budget_s if limit is None else search.num_evaluations / limit
                view.update(share, look)
                gone |= _ended(workers, gone, pipeline)
                time.sleep(POLL_S)
            view.update(1.0 if limit is None else search.num_evaluations / limit, look)
    finally:
        _stop(workers)
    if not any(worker.process.returncode == 0 for worker in workers):
        raise UserError(
            f"every one of {len(workers)} workers ended before the search was done; the first "
            f"said: {workers[0].last_words}; the same command goes on from here"
        )
    return search


def _start(folder: Path, index: int, num_workers: int, budget_s: float) -> Worker:
    """Start a process in a session of its own, so that Ctrl-C reaches it through this one only."""
    log = folder / "workers" / f"{index}.log"
    log.parent.mkdir(exist_ok=True)
    threads = max(1, usable_processors() // num_workers)
    command = [sys.executable, "-m", "nas.search_worker", str(folder)]
    command += ["--threads", str(threads), "--budget-s", str(budget_s)]
    environment = child_environment()
    with log.open("wb") as stream:
        return Worker(index, _popen(command, stream, environment), log)


def _popen(
    command: list[str], stream: IO[bytes], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        env=environment,
        start_new_session=True,
    )


def _ended(workers: list[Worker], known: set[int], pipeline: Pipeline) -> set[int]:
    """Return the workers that have ended, and say of new ones how, unless they were done."""
    ended = {worker.index for worker in workers if worker.process.poll() is not None}
    for index in sorted(ended - known):
        code = workers[index].process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            pipeline.reporter.say(f"search: worker {index} was ended by {name}")
        elif code > 0:
            pipeline.reporter.say(f"search: worker {index} failed: {workers[index].last_words}")
    return ended


def _stop(workers: list[Worker]) -> None:
    """Ask what still runs to stop as Ctrl-C does, then end it."""
    running = [worker for worker in workers if worker.process.poll() is None]
    for worker in running:
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE_S
    for worker in running:
        try:
            worker.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
