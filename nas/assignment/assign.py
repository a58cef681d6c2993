"""The best network under a budget: depth first, then blocks, over every width and depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nas.assignment.diagnosis import Diagnosis, diagnose
from nas.assignment.highs import INFEASIBLE, OPTIMAL, TIME_OUT
from nas.assignment.problem import Limit
from nas.assignment.programmes import DepthProgramme
from nas.assignment.solve import TIME_LIMIT_S, solve
from nas.pareto import non_dominated
from searchspace.arch import Arch


@dataclass(frozen=True)
class Assigned:
    """One network that keeps the limits, best of its width and depth.

    Args:
        arch: the network.
        status: ``"optimal"`` or ``"time-out"``.
        predicted_loss: loss without the skipped layers plus the scores of all blocks.
        gap: how much lower the predicted loss of another choice of this width and depth may be.
        exact: whether every limited cost is linear; see `solve.Solution`.
        additive: by limited metric the part of its cost that adds up over blocks, the rest being
            what is paid once or bends.
        costs: every cost in full.
        seconds: of solving.
    """

    arch: Arch
    status: str
    predicted_loss: float
    gap: float
    exact: bool
    additive: dict[str, float]
    costs: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Assignment:
    """What a budget allows.

    Args:
        limits: the budget.
        found: by predicted loss, lowest first, at most one per width and depth.
        status: ``"optimal"`` when every width and depth was solved or is impossible,
            ``"time-out"`` when some was not, ``"infeasible"`` when nothing keeps the limits.
        bound: no choice of any width and depth has a lower predicted loss.
        seconds: of solving.
    """

    limits: tuple[Limit, ...]
    found: tuple[Assigned, ...]
    status: str
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """How much lower the lowest predicted loss might be; 0 where that is proven."""
        return max(0.0, self.found[0].predicted_loss - self.bound) if self.found else math.inf


def assign(
    programmes: Sequence[DepthProgramme],
    limits: Sequence[Limit],
    time_limit_s: float = TIME_LIMIT_S,
) -> Assignment:
    """Return the best networks under hard limits.

    Args:
        programmes: one per width and depth.
        limits: all are kept, in full.
        time_limit_s: wall seconds that each programme may take.
    """
    found: dict[str, Assigned] = {}
    statuses, bounds, seconds = [], [math.inf], 0.0
    for programme in programmes:
        solution = solve(programme.problem, limits, time_limit_s)
        statuses.append(solution.status)
        seconds += solution.seconds
        if solution.status != INFEASIBLE:
            bounds.append(solution.value - solution.gap if solution.choice else solution.bound)
        if solution.choice is None:
            continue
        problem, choice = programme.problem, solution.choice
        arch = programme.arch(choice)
        item = Assigned(
            arch,
            solution.status,
            solution.value,
            solution.gap,
            solution.exact,
            {name: problem.additive(name, choice) for name in problem.metrics if "/" not in name},
            {name: problem.cost(name, choice) for name in problem.metrics if "/" not in name},
            solution.seconds,
        )
        if arch.id not in found or item.predicted_loss < found[arch.id].predicted_loss:
            found[arch.id] = item
    ordered = sorted(found.values(), key=lambda item: item.predicted_loss)
    status = TIME_OUT if TIME_OUT in statuses else OPTIMAL if OPTIMAL in statuses else INFEASIBLE
    return Assignment(tuple(limits), tuple(ordered), status, min(bounds), seconds)


def reasons(
    programmes: Sequence[DepthProgramme],
    limits: Sequence[Limit],
    time_limit_s: float = TIME_LIMIT_S,
) -> Diagnosis:
    """Say why no width and depth keeps the limits; see `diagnosis.diagnose`."""
    return diagnose([programme.problem for programme in programmes], limits, time_limit_s)


def sweep(
    programmes: Sequence[DepthProgramme],
    limits: Sequence[Limit],
    metric: str,
    num: int,
    time_limit_s: float = TIME_LIMIT_S,
) -> Iterator[Assignment]:
    """Yield the best networks for budgets of a metric, from the widest to the tightest.

    Budgets go in equal ratios from what the lowest predicted loss costs down to the least that any
    network costs.

    Args:
        programmes: one per width and depth.
        limits: kept at every budget.
        metric: whose budget is swept.
        num: of budgets.
        time_limit_s: wall seconds that each programme may take.
    """
    widest = assign(programmes, limits, time_limit_s)
    if not widest.found:
        yield widest
        return
    high = widest.found[0].costs[metric]
    least = [solve(p.problem, limits, time_limit_s, metric) for p in programmes]
    low = min(solution.value for solution in least if solution.choice is not None)
    for budget in np.geomspace(high, low, num) if low > 0 else np.linspace(high, low, num):
        # Rounding must not make the ends unreachable.
        limit = Limit(metric, float(budget) * (1 + 1e-9))
        yield assign(programmes, [*limits, limit], time_limit_s)


def front(items: Sequence[Assigned], metric: str, losses: Sequence[float]) -> list[int]:
    """Return the places of those that no other beats in loss and a cost, by that cost.

    Args:
        items: networks.
        metric: the cost.
        losses: of each network, evaluated or predicted.
    """
    if not items:
        return []
    values = np.array([[loss, i.costs[metric]] for i, loss in zip(items, losses, strict=True)])
    places = np.flatnonzero(non_dominated(values))
    return [int(place) for place in places[np.argsort(values[places, 1])]]
