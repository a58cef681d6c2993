"""A pool of actors: hands out work, replaces those that die, and does their work again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nas.cluster.actors import Answer, Evaluator, Facts
from searchspace.errors import UserError

MAX_DEATHS = 3
"""Actors that may die of one arch before it counts as failed: the arch may be what kills them."""

REFRESH_S = 2.0
QUIET_S = 5.0
IDLE_S = 0.2
Key = TypeVar("Key")


@dataclass
class Job(Generic[Key]):
    """One arch that has to be evaluated.

    Args:
        key: tells it from others.
        arch: in its JSON form.
        num_deaths: actors that died while they were at it.
    """

    key: Key
    arch: Mapping[str, Any]
    num_deaths: int = 0


class ActorPool(Generic[Key]):
    """Actors that evaluate.

    Args:
        build: see `Evaluator`.
        content: an object reference, so that each node gets it once.
        num_wanted: returns how many actors there should be; asked now and then.
        cpus: processors of one actor.
        num_threads: threads of one actor.
        check: refuses an actor by raising; called with what it says of itself.
        say: tells the user something.
        patience_s: seconds without any actor after which the pool gives up.
    """

    def __init__(
        self,
        build: Callable[[Any], Callable[..., float]],
        content: Any,
        *,
        num_wanted: Callable[[], int],
        cpus: float = 1.0,
        num_threads: int = 1,
        check: Callable[[Facts], None] = lambda facts: None,
        say: Callable[[str], None] = lambda text: None,
        patience_s: float = 300.0,
    ) -> None:
        import ray

        self._make = lambda: (
            ray.remote(Evaluator)
            .options(num_cpus=cpus, max_restarts=0, scheduling_strategy="SPREAD")
            .remote(build, content, num_threads)
        )
        self._num_wanted, self._check, self._say = num_wanted, check, say
        self._cpus, self._patience_s = cpus, patience_s
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Job[Key]]] = {}
        self._again: deque[Job[Key]] = deque()
        self._refreshed = float("-inf")
        self._alone_since: float | None = None
        self._has_said = False
        self.num_deaths = 0

    @property
    def num_ready(self) -> int:
        """Actors that can evaluate or do."""
        return len(self._idle) + len(self._busy)

    @property
    def num_free(self) -> int:
        """Actors that have nothing to do."""
        return len(self._idle) - len(self._again)

    def submit(self, key: Key, arch: Mapping[str, Any]) -> None:
        """Give a free actor an arch, in its JSON form."""
        self._start(Job(key, arch))

    def wait(self, timeout_s: float) -> list[tuple[Key, Answer]]:
        """Return what has come of archs; nothing when nothing has after a while.

        Args:
            timeout_s: seconds to wait for the first answer.

        Raises:
            UserError: when there has been no actor for `patience_s` seconds, or an actor does not
                start or is refused.
        """
        import ray

        self._refresh()
        refs = [*self._busy, *self._starting]
        if not refs:
            time.sleep(min(timeout_s, IDLE_S))
            self._be_patient()
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        answers = list(self._taken(ready))
        while self._again and self._idle:
            self._start(self._again.popleft())
        self._be_patient()
        return answers

    def stop(self) -> None:
        """End every actor."""
        import ray

        actors = [*self._idle, *self._starting.values(), *(a for a, _ in self._busy.values())]
        for actor in actors:
            ray.kill(actor)
        self._idle.clear()
        self._starting.clear()
        self._busy.clear()

    def _start(self, job: Job[Key]) -> None:
        actor = self._idle.pop()
        self._busy[actor.evaluate.remote(job.arch)] = (actor, job)

    def _refresh(self) -> None:
        """Start actors that are lacking; there may be more nodes, or fewer, than there were."""
        if time.monotonic() - self._refreshed < REFRESH_S:
            return
        self._refreshed = time.monotonic()
        for _ in range(self._num_wanted() - self.num_ready - len(self._starting)):
            actor: Any = self._make()
            self._starting[actor.hello.remote()] = actor

    def _taken(self, refs: list[Any]) -> Iterator[tuple[Key, Answer]]:
        import ray
        from ray import exceptions

        for ref in refs:
            if ref in self._starting:
                actor = self._starting.pop(ref)
                self._welcome(actor, ref)
                continue
            actor, job = self._busy.pop(ref)
            try:
                answer = ray.get(ref)
            except _deaths() as error:
                answer = self._after_death(actor, job, error)
            except exceptions.RayTaskError as error:
                answer = Answer(None, _fault(error), 0.0, error)
                self._idle.append(actor)
            else:
                self._idle.append(actor)
            if answer is not None:
                yield job.key, answer

    def _welcome(self, actor: Any, ref: Any) -> None:
        import ray

        try:
            facts = ray.get(ref)
        except _deaths() as error:
            ray.kill(actor)
            if getattr(error, "actor_init_failed", False):
                raise UserError(
                    f"an actor does not start: {_last_line(error)}; install hwnas on every node of "
                    "the cluster, in the version that runs here"
                ) from error
            return
        self._check(facts)
        self._idle.append(actor)

    def _after_death(self, actor: Any, job: Job[Key], error: Exception) -> Answer | None:
        """Have a job done again, unless it has seen too many actors die."""
        import ray

        ray.kill(actor)
        self.num_deaths += 1
        job.num_deaths += 1
        self._refreshed = float("-inf")
        if job.num_deaths >= MAX_DEATHS:
            reason = f"{job.num_deaths} actors died of it, the last one so: {_last_line(error)}"
            return Answer(None, reason, 0.0)
        self._say("search: an actor died; what it was at work on is evaluated again")
        self._again.append(job)
        return None

    def _be_patient(self) -> None:
        if self.num_ready:
            self._alone_since, self._has_said = None, False
            return
        now = time.monotonic()
        self._alone_since = now if self._alone_since is None else self._alone_since
        waited_s = now - self._alone_since
        if waited_s > self._patience_s:
            raise UserError(
                f"no node of the cluster had room for an actor of {self._cpus:g} CPUs for "
                f"{self._patience_s:.0f} s; add nodes, or lower ray.cpus; the same command goes on "
                "from here"
            )
        if waited_s > QUIET_S and not self._has_said:
            self._has_said = True
            self._say(
                f"search: waiting for a node with room for an actor of {self._cpus:g} CPUs, up to "
                f"{self._patience_s:.0f} s"
            )


def _deaths() -> tuple[type[Exception], ...]:
    """Return the errors that say that an actor or its node is gone, and not that it raised one."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
    )


def _fault(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
