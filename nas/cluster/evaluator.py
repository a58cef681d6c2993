"""The search loop over actors: the study stays here, only evaluations go out.

Without a barrier: as soon as an actor has answered it gets the next arch, and the sampler is asked
again while it works; trials under way count for the sampler as those of other processes do.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable

from nas.cluster.actors import Answer
from nas.cluster.pool import ActorPool
from nas.evaluation import EvaluationFailed
from nas.progress import Reporter
from nas.search_view import search_view
from nas.study import SearchRun, snapshot
from nas.study.search_run import MAX_FRUITLESS, Candidate

WAIT_S = 1.0
"""Seconds after which the study is looked at although no actor has answered."""

PATIENCE = 20
"""Proposals in a row that are nothing new after which the sampler is left alone for a while."""


class ActorSearch:
    """One search whose evaluations run on actors.

    Args:
        search: this process's part in the search; it alone writes to the study.
        pool: the actors; stopped by who made it.
        num_evaluations: in all; None for any number.
        num_ahead: candidates that are claimed before an actor is free for them, so that none
            waits; None for 1, or 0 where one actor evaluates alone: what it evaluates then is what
            one process without Ray does.
    """

    def __init__(
        self,
        search: SearchRun,
        pool: ActorPool[int],
        num_evaluations: int | None,
        num_ahead: int | None = None,
    ) -> None:
        self._search, self._pool, self._limit = search, pool, num_evaluations
        self._num_ahead = num_ahead
        self._out: dict[int, Candidate] = {}
        self._prepared: deque[Candidate] = deque()
        self._is_stuck = False
        self._fruitless = 0
        self._last_result = ""

    def run(
        self,
        budget_s: float,
        reporter: Reporter,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Evaluate until the number asked for is there, or until `budget_s` seconds are spent.

        Args:
            budget_s: counts only without a number of evaluations.
            reporter: shows front and hypervolume.
            should_stop: asked between evaluations.

        Raises:
            UserError: when the sampler finds no candidate, or the cluster has no room for actors.
        """
        search = self._search
        spent, start = search.seconds, time.perf_counter()
        look_at = functools.partial(snapshot, search.study, search.problem.objectives)
        with search.at_work_on(self._trial_ids), search_view(reporter.quiet) as view:
            try:
                while True:
                    done, under_way = search.claims.look()
                    elapsed = spent + time.perf_counter() - start
                    share = elapsed / budget_s if self._limit is None else len(done) / self._limit
                    view.update(share, look_at)
                    if share >= 1.0 or should_stop() or self._is_over(reporter):
                        if not self._out:
                            break
                        self._collect(WAIT_S)
                    elif self._wants_more(len(done) + len(under_way)):
                        self._propose()
                        # Who has answered meanwhile does not wait until all others have work.
                        self._collect(0.0)
                    else:
                        self._collect(WAIT_S)
                        self._is_stuck = False
            finally:
                self._return_all()

    def _trial_ids(self) -> list[int]:
        candidates = [*self._out.values(), *self._prepared]
        return [candidate.trial._trial_id for candidate in candidates]

    def _wants_more(self, num_taken: int) -> bool:
        if self._is_stuck or (self._limit is not None and num_taken >= self._limit):
            return False
        ahead = self._num_ahead
        if ahead is None:
            ahead = 1 if self._pool.num_ready > 1 else 0
        return len(self._prepared) < max(self._pool.num_free, 0) + ahead

    def _propose(self) -> None:
        found = self._search.propose(self._limit)
        if isinstance(found, Candidate):
            self._fruitless = 0
            self._prepared.append(found)
            self._hand_out()
            return
        self._fruitless += 1
        # What is under way may be all that the sampler can think of: it is asked again after that.
        is_time = self._fruitless % PATIENCE == 0
        self._is_stuck = is_time and found == "withdrawn" and bool(self._out)
        self._last_result = found

    def _hand_out(self) -> None:
        while self._prepared and self._pool.num_free > 0:
            candidate = self._prepared.popleft()
            self._out[candidate.trial.number] = candidate
            self._pool.submit(candidate.trial.number, candidate.arch.to_dict())

    def _collect(self, timeout_s: float) -> None:
        answers = self._pool.wait(timeout_s)
        # Actors first, the study after: they work while it is written.
        self._hand_out()
        for number, answer in answers:
            # Of a fault of the program too, so that the next command gets past this arch.
            self._search.finish(self._out[number], _outcome(answer), answer.seconds)
            del self._out[number]
            if answer.fault is not None:
                raise answer.fault

    def _is_over(self, reporter: Reporter) -> bool:
        if self._fruitless <= MAX_FRUITLESS or self._out:
            return False
        self._search.give_up(self._last_result, reporter)
        return True

    def _return_all(self) -> None:
        """Queue again what is claimed and not evaluated."""
        for candidate in [*self._out.values(), *self._prepared]:
            self._search.give_back(candidate, "stopped")
        self._out.clear()
        self._prepared.clear()


def _outcome(answer: Answer) -> float | EvaluationFailed:
    return EvaluationFailed(answer.reason) if answer.loss is None else answer.loss
