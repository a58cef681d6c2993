"""The search loop: resume, duplicates, failures, constraints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Constraint, Objectives, Prices, SpaceCodec
from nas.evaluation import EvaluationFailed
from nas.feasibility import feasible_start
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun, evaluated, search_summary, sqlite_url
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params, weight_bytes
from searchspace.errors import UserError
from searchspace.space import SearchSpace

NAMES = ("loss", "latency_ms", "weight_bytes")
QUIET = Reporter(quiet=True)


class Evaluator:
    """A loss that falls with size; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, arch: Arch) -> float:
        self.asked.append(arch.id)
        return 3.0 - 0.1 * float(np.log(arch_cost(arch, num_params)))


def problem(
    space: SearchSpace, table: LatencyTable, evaluate: object, *constraints: str, seeds: bool = True
) -> SearchProblem:
    prices = Prices(space, table, "prefill_b1_t64")
    objectives = Objectives.parse(NAMES, constraints, prices.metrics)
    archs = (space.largest(), space.smallest()) if seeds else ()
    return SearchProblem(space, prices, objectives, evaluate, seeds=archs)  # type: ignore[arg-type]


def test_prices_are_those_of_the_archs(space: SearchSpace, table: LatencyTable) -> None:
    prices = Prices(space, table, "prefill_b1_t64")
    rows = space.sample_genotypes(np.random.default_rng(0), 50)
    for name, cost in (("params", num_params), ("weight_bytes", weight_bytes)):
        expected = [arch_cost(space.decode(row), cost) for row in rows]
        assert prices.of(name, rows).tolist() == expected
    latency = [table.latency_ms(space.decode(row), table.workloads[0]) for row in rows]
    assert prices.of("latency_ms", rows) == pytest.approx(latency)
    assert prices.of("prefill_ms", rows) == pytest.approx(latency)


@pytest.mark.parametrize("sampler", ["predictor", "random", "nsga2"])
def test_search_stops_at_the_number_asked_for_and_goes_on_from_there(
    space: SearchSpace, table: LatencyTable, tmp_path: Path, sampler: str
) -> None:
    first = Evaluator()
    SearchRun(problem(space, table, first), sqlite_url(tmp_path), sampler, seed=0).run(
        9, 1e9, QUIET
    )
    assert len(first.asked) == len(set(first.asked)) == 9
    assert {space.largest().id, space.smallest().id} <= set(first.asked)
    second = Evaluator()
    again = SearchRun(problem(space, table, second), sqlite_url(tmp_path), sampler, seed=0)
    again.run(9, 1e9, QUIET)
    assert second.asked == []
    again.run(13, 1e9, QUIET)
    assert len(second.asked) == 4
    assert not set(second.asked) & set(first.asked)
    assert len(evaluated(again.study)) == 13


def test_an_interrupted_evaluation_is_queued_again(
    space: SearchSpace, table: LatencyTable, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    asked: list[str] = []

    def evaluate(arch: Arch) -> float:
        asked.append(arch.id)
        if len(asked) == 4:
            raise Killed
        return 1.0

    with pytest.raises(Killed):
        SearchRun(problem(space, table, evaluate), sqlite_url(tmp_path), "predictor", 0).run(
            8, 1e9, QUIET
        )
    search = SearchRun(problem(space, table, evaluate), sqlite_url(tmp_path), "predictor", 0)
    search.run(8, 1e9, QUIET)
    assert asked[4] == asked[3], "the interrupted candidate comes first"
    assert len(set(asked)) == 8 and len(asked) == 9
    assert not search.study.get_trials(states=(TrialState.RUNNING,))


def test_a_failed_evaluation_is_recorded_with_its_reason_and_the_search_goes_on(
    space: SearchSpace, table: LatencyTable, tmp_path: Path
) -> None:
    calls = 0

    def evaluate(arch: Arch) -> float:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise EvaluationFailed("the loss is nan")
        return float(calls)

    search = SearchRun(problem(space, table, evaluate), sqlite_url(tmp_path), "predictor", 0)
    search.run(9, 1e9, QUIET)
    assert search.num_evaluations == 9 and len(search.losses) == 6
    summary = search_summary(search.study, search.problem.objectives, "predictor")
    failed = [trial for trial in summary["trials"] if trial["state"] == "failed"]
    assert [trial["reason"] for trial in failed] == ["the loss is nan"] * 3
    volumes = summary["hypervolume"]
    assert len(volumes) == 6 and volumes == sorted(volumes)


@pytest.mark.parametrize("sampler", ["predictor", "random"])
def test_no_evaluation_breaks_an_exact_constraint(
    space: SearchSpace, table: LatencyTable, tmp_path: Path, sampler: str
) -> None:
    evaluator = Evaluator()
    search = SearchRun(
        problem(space, table, evaluator, "latency_ms<=0.1", "weight_bytes<=200000"),
        sqlite_url(tmp_path), sampler, seed=1,
    )  # fmt: skip
    search.run(12, 1e9, QUIET)
    assert len(evaluator.asked) == 12
    for item in evaluated(search.study):
        assert item.feasible
        assert table.latency_ms(item.arch, table.workloads[0]) <= 0.1
        assert arch_cost(item.arch, weight_bytes) <= 200_000


def test_a_constraint_on_the_loss_marks_candidates_infeasible(
    space: SearchSpace, table: LatencyTable, tmp_path: Path
) -> None:
    search = SearchRun(
        problem(space, table, Evaluator(), "loss<=1.9"), sqlite_url(tmp_path), "random", seed=1
    )
    search.run(10, 1e9, QUIET)
    for item in evaluated(search.study):
        assert item.feasible == (item.values[0] <= 1.9)


def test_an_impossible_constraint_names_the_best_that_is_reachable(
    space: SearchSpace, table: LatencyTable, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"keeps latency_ms<=0.001 .* reachable is latency_ms=0.0"):
        SearchRun(problem(space, table, Evaluator(), "latency_ms<=0.001"), sqlite_url(tmp_path),
                  "predictor", seed=0)  # fmt: skip


def test_a_tight_constraint_is_met_where_random_draws_miss_it(
    space: SearchSpace, table: LatencyTable
) -> None:
    smallest = min(
        table.latency_ms(space.decode(row), table.workloads[0])
        for row in space.sample_genotypes(np.random.default_rng(5), 2000)
    )
    tight = problem(space, table, Evaluator(), f"latency_ms<={smallest * 1.001}")
    codec = SpaceCodec(space, tight.prices, tight.objectives)
    start = feasible_start(space, tight.prices, tight.objectives)
    assert len(start) and (codec.constraints(start) <= 0).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latency_ms=8", "write METRIC<=NUMBER"),
        ("latncy_ms<=8", "did you mean 'latency_ms'"),
        ("latency_ms<=fast", "write METRIC<=NUMBER"),
    ],
)
def test_constraints_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Constraint.parse(text, ["loss", "latency_ms"])
