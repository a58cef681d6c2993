"""Integer programming over one choice per slot, against trying every choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.assignment import AssignmentProblem, Coupling, Curve, Limit, Slot, diagnose, solve
from nas.assignment.dominance import undominated
from nas.assignment.highs import ask
from nas.assignment.linear import Programme, cost_line, score_line
from searchspace.errors import UserError

TRAITS = ("a", "b", "c")


def random_problem(seed: int, num_slots: int = 4, num_choices: int = 4) -> AssignmentProblem:
    """A small problem with ties, couplings and costs that are paid once."""
    rng = np.random.default_rng(seed)
    slots = []
    for index in range(num_slots):
        num = int(rng.integers(1, num_choices + 1))
        costs = {
            "ms": rng.integers(0, 9, num) / 4.0,
            "bytes": rng.integers(1, 100, num).astype(float),
        }
        traits = tuple(frozenset(t for t in TRAITS if rng.random() < 0.4) for _ in range(num))
        slots.append(Slot(f"s{index}", rng.integers(-5, 9, num) / 8.0, costs, traits))
    once = {"ms": dict(zip(TRAITS, rng.integers(-3, 5, 3) / 2.0, strict=True))}
    rules = []
    if rng.random() < 0.6:
        weights = {i: rng.integers(0, 2, len(slots[i])).astype(float) for i in (0, num_slots - 1)}
        rules.append(Coupling(weights, 0.0, 1.0))
    return AssignmentProblem(slots, 1.0, {"ms": 0.5, "bytes": 7.0}, rules, once)


def every_choice(problem: AssignmentProblem) -> list[tuple[int, ...]]:
    """All choices that keep the couplings."""
    return [
        choice
        for choice in itertools.product(*(range(len(slot)) for slot in problem.slots))
        if problem.allowed(choice)
    ]


def best_by_trying(problem: AssignmentProblem, limits: Sequence[Limit]) -> float:
    """The lowest score of all choices that keep the limits; infinite where none does."""
    kept = [c for c in every_choice(problem) if problem.keeps(limits, c)]
    return min(map(problem.score, kept), default=math.inf)


def random_limits(problem: AssignmentProblem, rng: np.random.Generator) -> list[Limit]:
    """Limits about the range of what is there, some of them hit exactly by a choice."""
    choices = every_choice(problem)
    limits = []
    for metric in ("ms", "bytes"):
        for at_least in (False, True):
            if choices and rng.random() < 0.6:
                costs = [problem.cost(metric, choices[i]) for i in rng.integers(0, len(choices), 2)]
                limits.append(Limit(metric, float(np.mean(costs[: rng.integers(1, 3)])), at_least))
    return limits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_optimum_is_that_of_trying_every_choice(seed: int) -> None:
    problem = random_problem(seed)
    limits = random_limits(problem, np.random.default_rng(seed))
    wanted = best_by_trying(problem, limits)
    solution = solve(problem, limits)
    assert solution.exact
    if math.isinf(wanted):
        assert solution.status == "infeasible" and solution.choice is None
        return
    assert solution.status == "optimal" and solution.choice is not None and solution.gap == 0.0
    assert problem.keeps(limits, solution.choice) and problem.allowed(solution.choice)
    assert solution.value == pytest.approx(wanted, abs=1e-6)
    assert solution.value == problem.score(solution.choice)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_cost_is_minimised_or_maximised_as_well(seed: int, largest: bool) -> None:
    problem = random_problem(seed)
    choices = every_choice(problem)
    solution = solve(problem, metric="ms", largest=largest)
    costs = [problem.cost("ms", choice) for choice in choices]
    if not costs:
        assert solution.status == "infeasible"
        return
    assert solution.value == pytest.approx(max(costs) if largest else min(costs), abs=1e-6)


def lowest_by_dynamic_programming(scores: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The lowest score of one choice per row whose whole-numbered costs stay within a budget."""
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for row_scores, row_costs in zip(scores, costs, strict=True):
        after = np.full(budget + 1, np.inf)
        for score, cost in zip(row_scores, row_costs, strict=True):
            if cost <= budget:
                np.minimum(after[cost:], best[: budget + 1 - cost] + score, out=after[cost:])
        best = after
    return float(best.min())


@pytest.mark.parametrize("seed", range(4))
def test_a_large_problem_with_one_limit_is_that_of_dynamic_programming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 60, (24, 12))
    scores = 1.0 - costs / 60 + rng.uniform(0, 0.6, costs.shape)
    slots = [Slot(str(i), scores[i], {"c": costs[i].astype(float)}) for i in range(24)]
    budget = int(0.35 * costs.max(axis=1).sum())
    solution = solve(AssignmentProblem(slots), [Limit("c", budget)])
    wanted = lowest_by_dynamic_programming(scores, costs, budget)
    assert solution.status == "optimal" and solution.value == pytest.approx(wanted, abs=1e-6)


def bent_problem(seed: int) -> AssignmentProblem:
    """Latency rises faster once a working set no longer fits, as `Spill` has it."""
    rng = np.random.default_rng(seed)
    slots = []
    for index in range(4):
        us = np.sort(rng.uniform(0.1, 2.0, 5))
        mib = us * rng.uniform(0.7, 1.3, 5)
        scores = 2.0 - us + rng.uniform(0, 0.3, 5)
        slots.append(Slot(str(index), scores, {"ms": us, "us": us, "mib": mib}))

    def spilled(us: float, mib: float) -> float:
        return float(np.clip((mib - 2.0) / 3.0, 0.0, 1.0) * (0.2 * us + 0.1 * mib))

    return AssignmentProblem(slots, curves={"ms": Curve(("us", "mib"), spilled)})


@pytest.mark.parametrize("seed", range(12))
def test_a_cost_that_bends_is_kept_in_full_and_near_the_best(seed: int) -> None:
    problem = bent_problem(seed)
    choices = every_choice(problem)
    scores = np.array([problem.score(c) for c in choices])
    costs = np.array([problem.cost("ms", c) for c in choices])
    for share in (0.05, 0.2, 0.5, 0.8):
        limit = Limit("ms", float(np.quantile(costs, share)))
        solution = solve(problem, [limit])
        assert solution.choice is not None and not solution.exact
        assert limit.keeps(problem.cost("ms", solution.choice))
        wanted = scores[costs <= limit.value].min()
        assert solution.value <= wanted + 0.05 * np.ptp(scores)


def test_a_bent_cost_below_the_least_is_infeasible() -> None:
    problem = bent_problem(0)
    least = min(problem.cost("ms", choice) for choice in every_choice(problem))
    assert solve(problem, metric="ms").value == pytest.approx(least)
    assert solve(problem, [Limit("ms", least * 0.99)]).status == "infeasible"
    assert solve(problem, [Limit("ms", least * 1.001)]).choice is not None


def test_dominated_choices_are_left_out_and_no_others() -> None:
    slot = Slot(
        "s", np.array([1.0, 2.0, 2.0, 0.5, 1.0]), {"c": np.array([3.0, 3.0, 1.0, 9.0, 3.0])}
    )
    problem = AssignmentProblem([slot])

    def kept(at_least: bool) -> list[int]:
        limits = [(Limit("c", 5.0, at_least), cost_line(problem, "c", {}))]
        (left,) = undominated(Programme(problem, score_line(problem), limits), [])
        return left.tolist()

    assert kept(at_least=False) == [0, 2, 3]
    assert kept(at_least=True) == [3]


def hard_problem(num_slots: int, num_choices: int) -> tuple[AssignmentProblem, list[Limit]]:
    """Scores are the costs themselves: every bound is tight and nothing can be cut off."""
    rng = np.random.default_rng(0)
    costs = rng.integers(1, 10_001, (num_slots, num_choices, 2)).astype(float)
    slots = [
        Slot(str(i), -c.sum(axis=1), {"a": c[:, 0], "b": c[:, 1]}) for i, c in enumerate(costs)
    ]
    low, high = costs.min(axis=1).sum(axis=0), costs.max(axis=1).sum(axis=0)
    limits = [Limit(n, float(v)) for n, v in zip("ab", low + 0.25 * (high - low), strict=True)]
    return AssignmentProblem(slots), limits


def test_a_time_out_says_so_with_its_gap() -> None:
    problem, limits = hard_problem(32, 12)
    solution = solve(problem, limits, time_limit_s=0.6)
    assert solution.status == "time-out"
    assert solution.choice is not None and problem.keeps(limits, solution.choice)
    assert solution.gap == pytest.approx(solution.value - solution.bound) and solution.gap > 0
    assert solution.bound < solution.value


def test_no_time_at_all_is_a_time_out_and_not_infeasible() -> None:
    problem, limits = hard_problem(64, 12)
    solution = solve(problem, limits, time_limit_s=1e-6)
    assert solution.status == "time-out"
    if solution.choice is None:
        assert math.isnan(solution.value) and solution.gap == math.inf


def test_what_blocks_is_said_with_what_is_reachable() -> None:
    slots = [
        Slot(str(i), np.zeros(2), {"ms": np.array([1.0, 4.0]), "kb": np.array([30.0, 10.0])})
        for i in range(3)
    ]
    problem = AssignmentProblem(slots)
    alone = Limit("ms", 2.0)
    found = diagnose([problem], [alone, Limit("kb", 90.0)])
    assert found.blocking == (alone,) and found.alone[alone] == pytest.approx(3.0)
    assert "ms<=2" in found.message() and "is 3" in found.message()

    both = [Limit("ms", 5.0), Limit("kb", 40.0), Limit("kb", 5.0, at_least=True)]
    found = diagnose([problem], both)
    assert set(found.blocking) == set(both[:2])
    assert found.together[both[0]] == pytest.approx(12.0)
    assert found.together[both[1]] == pytest.approx(90.0)
    nearest = {"ms": 6.0, "kb": 70.0}, {"ms": 9.0, "kb": 50.0}, {"ms": 3.0, "kb": 90.0}
    excess = [(max(0, n["ms"] - 5) / 5 + max(0, n["kb"] - 40) / 40, n) for n in nearest]
    assert found.nearest == pytest.approx(min(excess, key=lambda item: item[0])[1])
    assert "ms<=5 and kb<=40" in found.message()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_blocking_limits_exclude_each_other_and_none_can_be_spared(seed: int) -> None:
    problem = random_problem(seed, num_slots=3)
    rng = np.random.default_rng(seed)
    limits = random_limits(problem, rng) + random_limits(problem, rng)
    limits = list(dict.fromkeys(limits))
    if not math.isinf(best_by_trying(problem, limits)) or not every_choice(problem):
        return
    blocking = diagnose([problem], limits).blocking
    alone = [li for li in blocking if math.isinf(best_by_trying(problem, [li]))]
    assert math.isinf(best_by_trying(problem, blocking))
    if not alone:
        for limit in blocking:
            rest = [other for other in blocking if other != limit]
            assert not math.isinf(best_by_trying(problem, rest))


def test_the_elastic_form_breaks_nothing_that_can_be_kept() -> None:
    problem = bent_problem(0)
    limits = [Limit("us", 2.0), Limit("mib", 1.0, at_least=True)]
    lines = [(limit, cost_line(problem, limit.metric, {})) for limit in limits]
    answer = ask(Programme(problem, score_line(problem), lines, elastic=True), 5.0)
    assert answer.choice is not None and problem.keeps(limits, answer.choice)


def test_limits_are_read_and_written() -> None:
    for text in ("latency_ms<=8", "params>=1e+06"):
        assert str(Limit.parse(text, ["latency_ms", "params"])) == text
    assert Limit.parse(" params > 3 ", ["params"]) == Limit("params", 3.0, at_least=True)
    for text in ("latency_ms=8", "latency_ms<=nan", "latency_ms<=", "<=3", "latency_ms<=1e999"):
        with pytest.raises(UserError, match="is not understood"):
            Limit.parse(text, ["latency_ms"])
    with pytest.raises(UserError, match="did you mean 'latency_ms'"):
        Limit.parse("latencyms<=8", ["latency_ms"])


def test_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    problem, limits = hard_problem(12, 8)
    solve(problem, limits, time_limit_s=0.3)
    assert capfd.readouterr() == ("", "")
