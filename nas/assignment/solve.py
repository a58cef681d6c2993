"""The best choice under hard limits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.assignment.highs import INFEASIBLE, OPTIMAL, TIME_OUT, Answer, ask
from nas.assignment.linear import Line, Point, Programme, cost_line, negated, score_line
from nas.assignment.problem import AssignmentProblem, Choice, Limit

TIME_LIMIT_S = 10.0
MAX_ROUNDS = 10
MARGIN = 2e-6
"""Share by which a limit is tightened where HiGHS has used up its tolerance of 1e-6."""
Points = dict[str, Point]
"""For each metric that bends, where its tangent is taken."""


@dataclass(frozen=True)
class Solution:
    """What was found.

    Args:
        status: ``"optimal"``, proven where `exact`; ``"time-out"``, the best so far; or
            ``"infeasible"``.
        choice: keeps every limit in full; None where there is none, or none was found in time.
        value: the score of the choice, or the metric that was asked for; NaN without a choice.
        bound: no choice has a lower value (a higher one where the largest was asked for).
        exact: whether every cost that counts is linear. One that bends was replaced by its
            tangent at the solution: the limits are kept in full, but another choice, far from
            here, may be better by as much as the tangent is wrong there.
        seconds: it took.
        rounds: programmes that were solved.
    """

    status: str
    choice: Choice | None
    value: float
    bound: float
    exact: bool
    seconds: float
    rounds: int

    @property
    def gap(self) -> float:
        """How far the value may be from the best; 0 where that is proven."""
        if self.choice is None:
            return math.inf
        return 0.0 if self.status == OPTIMAL else abs(self.value - self.bound)


def solve(
    problem: AssignmentProblem,
    limits: Sequence[Limit] = (),
    time_limit_s: float = TIME_LIMIT_S,
    metric: str | None = None,
    largest: bool = False,
) -> Solution:
    """Return the choice of lowest score that keeps every limit.

    Args:
        problem: what can be chosen.
        limits: hard.
        time_limit_s: wall seconds, all rounds together.
        metric: minimise this cost in place of the score.
        largest: maximise that cost.

    Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11: the
    multiple-choice knapsack problem, here with several knapsacks.
    """
    return _Search(problem, limits, time_limit_s, metric, largest).run()


class _Search:
    """Programmes solved in turn, until the tangents are those at the solution."""

    def __init__(
        self,
        problem: AssignmentProblem,
        limits: Sequence[Limit],
        time_limit_s: float,
        metric: str | None,
        largest: bool,
    ) -> None:
        self._problem, self._limits = problem, limits
        self._metric, self._sign = metric, -1.0 if largest else 1.0
        self._start, self._time_limit_s = time.perf_counter(), time_limit_s
        names = {limit.metric for limit in limits} | ({metric} if metric else set())
        self._bent = sorted(name for name in names if name in problem.curves)
        self._margins = [0.0] * len(limits)
        self._rounds = 0

    def run(self) -> Solution:
        best: Choice | None = None
        answer = Answer(INFEASIBLE, None, -math.inf, 0.0)
        for points in self._starts():
            best, answer = self._from(points)
            if best is not None or answer.status == TIME_OUT:
                break
        value = math.nan if best is None else self._sign * self._value(best)
        status = answer.status if best is not None or answer.status == TIME_OUT else INFEASIBLE
        return Solution(
            status, best, value, self._sign * answer.bound, not self._bent,
            time.perf_counter() - self._start, self._rounds,
        )  # fmt: skip

    def _from(self, points: Points) -> tuple[Choice | None, Answer]:
        """Return the best choice that keeps every limit in full, and the last answer."""
        best: Choice | None = None
        found = Answer(INFEASIBLE, None, -math.inf, 0.0)
        seen: list[Points] = []
        for _ in range(MAX_ROUNDS):
            answer = self._ask(points)
            if answer.choice is None:
                if best is None or answer.status == TIME_OUT:
                    return best, found if best is not None else answer
                points = self._between(points, self._points(best))
                continue
            if not self._problem.keeps(self._limits, answer.choice):
                self._tighten(answer.choice, seen, points)
            elif best is None or self._value(answer.choice) < self._value(best):
                best, found = answer.choice, answer
            here = self._points(answer.choice)
            if answer.status == TIME_OUT or (best is not None and _same(here, points)):
                return best, found if best is not None else answer
            seen.append(points)
            points = here
        return best, found

    def _ask(self, points: Points) -> Answer:
        left_s = self._time_limit_s - (time.perf_counter() - self._start)
        if left_s <= 0:
            return Answer(TIME_OUT, None, -math.inf, 0.0)
        self._rounds += 1
        limits = [(li, cost_line(self._problem, li.metric, points)) for li in self._limits]
        return ask(Programme(self._problem, self._objective(points), limits), left_s, self._margins)

    def _objective(self, points: Points) -> Line:
        if self._metric is None:
            return score_line(self._problem)
        line = cost_line(self._problem, self._metric, points)
        return line if self._sign > 0 else negated(line)

    def _tighten(self, choice: Choice, seen: list[Points], points: Points) -> None:
        """Tighten limits that a choice breaks although its programme did not say so."""
        going_round = any(_same(points, other) for other in seen)
        for number, limit in enumerate(self._limits):
            excess = limit.excess(self._problem.cost(limit.metric, choice))
            if excess > 0 and (going_round or limit.metric not in self._bent):
                share = excess / abs(limit.value) if limit.value and going_round else 0.0
                self._margins[number] += max(MARGIN, share)

    def _starts(self) -> list[Points]:
        """Return where to take the first tangents: where the limits are easiest to keep."""
        if not self._bent:
            return [{}]
        starts = []
        for largest in (False, True):
            slots = self._problem.slots
            chosen: Points = {}
            for name in self._bent:
                costs = [slot.costs[name] for slot in slots]
                pick = tuple(int(c.argmax() if largest else c.argmin()) for c in costs)
                chosen[name] = self._problem.point(self._problem.curves[name], pick)
            starts.append(chosen)
        wants_much = any(li.at_least and li.metric in self._bent for li in self._limits)
        return starts[::-1] if wants_much else starts

    def _value(self, choice: Choice) -> float:
        if self._metric is None:
            return self._problem.score(choice)
        return self._sign * self._problem.cost(self._metric, choice)

    def _points(self, choice: Choice) -> Points:
        curves = self._problem.curves
        return {name: self._problem.point(curves[name], choice) for name in self._bent}

    @staticmethod
    def _between(first: Points, second: Points) -> Points:
        def middle(a: Point, b: Point) -> Point:
            return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2

        return {name: middle(point, second[name]) for name, point in first.items()}


def _same(first: Points, second: Points) -> bool:
    return all(np.allclose(point, second[name], rtol=1e-9) for name, point in first.items())
