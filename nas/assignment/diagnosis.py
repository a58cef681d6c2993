"""Why no choice keeps the limits, and what is reachable instead.

Several problems (one per width and depth) are alternatives: limits are reachable when one of them
reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nas.assignment.highs import INFEASIBLE, ask
from nas.assignment.linear import Programme, cost_line, score_line
from nas.assignment.problem import AssignmentProblem, Choice, Limit
from nas.assignment.solve import TIME_LIMIT_S, solve


@dataclass(frozen=True)
class Diagnosis:
    """Why limits cannot be kept.

    Args:
        alone: by limit the value that is reachable without the others.
        together: by limit the value that is reachable while all others are kept; None where
            the others cannot be kept either.
        blocking: limits that cannot be kept together, none of which can be spared.
        nearest: by metric the values of the choice that breaks the limits least, summed in
            shares of them; empty when none was found in time.
    """

    alone: Mapping[Limit, float]
    together: Mapping[Limit, float | None]
    blocking: tuple[Limit, ...]
    nearest: Mapping[str, float]

    def message(self) -> str:
        """Return one sentence for the user."""
        impossible = [
            limit for limit, value in self.alone.items() if not limit.keeps(value)
        ]  # whatever the others are
        wanted = " and ".join(map(str, self.blocking))
        if impossible:
            parts = [
                f"{'the largest' if limit.at_least else 'the smallest'} {limit.metric} of the "
                f"space is {self.alone[limit]:.4g}"
                for limit in impossible
            ]
        else:
            parts = [
                f"with the others kept, {limit.metric} gets {'up' if limit.at_least else 'down'} "
                f"to {value:.4g}"
                for limit in self.blocking
                if (value := self.together[limit]) is not None
            ]
        near = ", ".join(f"{name}={value:.4g}" for name, value in self.nearest.items())
        nearest = f"; the nearest that is reachable is {near}" if near else ""
        return (
            f"no assignment keeps {wanted}: {', '.join(parts) or 'they exclude each other'}"
            f"{nearest}; loosen a limit"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {
            "alone": {str(limit): _number(value) for limit, value in self.alone.items()},
            "together": {str(limit): _number(value) for limit, value in self.together.items()},
            "blocking": [str(limit) for limit in self.blocking],
            "nearest": dict(self.nearest),
        }


def diagnose(
    problems: Sequence[AssignmentProblem],
    limits: Sequence[Limit],
    time_limit_s: float = TIME_LIMIT_S,
) -> Diagnosis:
    """Say why no choice of any problem keeps the limits.

    Args:
        problems: alternatives.
        limits: cannot be kept together.
        time_limit_s: wall seconds that each programme may take.

    Source: for the blocking set Chinneck and Dravnieks, "Locating minimal infeasible constraint
    sets in linear programs" (1991), the deletion filter; for the nearest choice its elastic form.
    """
    alone = {limit: _reached(problems, limit, (), time_limit_s) for limit in limits}
    together = {
        limit: _reached(problems, limit, [other for other in limits if other != limit],
                        time_limit_s)
        for limit in limits
    }  # fmt: skip
    return Diagnosis(
        {limit: math.nan if value is None else value for limit, value in alone.items()},
        together,
        _blocking(problems, limits, alone, time_limit_s),
        _nearest(problems, limits, time_limit_s),
    )


def _reached(
    problems: Sequence[AssignmentProblem],
    limit: Limit,
    others: Sequence[Limit],
    time_limit_s: float,
) -> float | None:
    """Return the value nearest to a limit that a choice reaches which keeps the others."""
    found = [
        solve(problem, others, time_limit_s, limit.metric, limit.at_least) for problem in problems
    ]
    values = [solution.value for solution in found if solution.choice is not None]
    if not values:
        return None
    return max(values) if limit.at_least else min(values)


def _blocking(
    problems: Sequence[AssignmentProblem],
    limits: Sequence[Limit],
    alone: Mapping[Limit, float | None],
    time_limit_s: float,
) -> tuple[Limit, ...]:
    impossible = [li for li, value in alone.items() if value is None or not li.keeps(value)]
    if impossible:
        return tuple(impossible)
    blocking = list(limits)
    for limit in limits:
        rest = [other for other in blocking if other != limit]
        if all(solve(p, rest, time_limit_s).status == INFEASIBLE for p in problems):
            blocking = rest
    return tuple(blocking)


def _nearest(
    problems: Sequence[AssignmentProblem], limits: Sequence[Limit], time_limit_s: float
) -> dict[str, float]:
    found: list[tuple[float, dict[str, float]]] = []
    for problem in problems:
        choice = _elastic(problem, limits, time_limit_s)
        if choice is None:
            continue
        costs = {limit.metric: problem.cost(limit.metric, choice) for limit in limits}
        broken = sum(
            max(0.0, limit.excess(costs[limit.metric])) / (abs(limit.value) or 1.0)
            for limit in limits
        )
        found.append((broken, costs))
    return min(found, key=lambda item: item[0])[1] if found else {}


def _elastic(
    problem: AssignmentProblem, limits: Sequence[Limit], time_limit_s: float
) -> Choice | None:
    """Return the choice that breaks the limits least; tangents are taken where costs are low."""
    points = {
        name: problem.point(curve, tuple(int(s.costs[name].argmin()) for s in problem.slots))
        for name, curve in problem.curves.items()
    }
    lines = [(limit, cost_line(problem, limit.metric, points)) for limit in limits]
    return ask(Programme(problem, score_line(problem), lines, elastic=True), time_limit_s).choice


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
