"""Constraints that no arch keeps: which of them block, and what is reachable instead."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Constraint, Objectives, Prices
from nas.feasibility import Feasibility, feasible_start
from searchspace.errors import UserError
from searchspace.space import SearchSpace


class Pulling:
    """Two costs that pull against each other: what makes one less makes the other more."""

    def __init__(self, space: SearchSpace) -> None:
        rng = np.random.default_rng(0)
        sizes = [len(choices) for choices in space.genes.values()]
        self._a = [rng.random(size) for size in sizes]
        self._b = [1.5 - column + 0.1 * rng.random(len(column)) for column in self._a]
        self.metrics = ["a_ms", "b_ms"]

    def of(self, metric: str, rows: np.ndarray) -> np.ndarray:
        table = self._a if metric == "a_ms" else self._b
        return sum(column[rows[:, g]] for g, column in enumerate(table))  # type: ignore[return-value]

    def of_all(self, metrics: list[str], rows: np.ndarray) -> np.ndarray:
        return np.stack([self.of(metric, rows) for metric in metrics], axis=1)


@pytest.fixture(scope="module")
def small() -> SearchSpace:
    return SearchSpace(
        "small", 64, (32, 16), 8, 2, {"softmax": {}, "pool": {}}, ((2, 2), (1, 1)), (0, 16, 32)
    )


def every_genotype(space: SearchSpace) -> np.ndarray:
    sizes = [range(len(choices)) for choices in space.genes.values()]
    rows = np.array(list(itertools.product(*sizes)))
    return np.unique(space.canonical(rows), axis=0)


@pytest.fixture(scope="module")
def rows(small: SearchSpace) -> np.ndarray:
    return every_genotype(small)


def constraints(**limits: float) -> list[Constraint]:
    return [Constraint(metric, limit) for metric, limit in limits.items()]


def test_the_least_of_one_cost_is_the_true_one(small: SearchSpace, rows: np.ndarray) -> None:
    prices = Pulling(small)
    least = prices.of("a_ms", rows).min()
    search = Feasibility(small, prices, constraints(a_ms=least * 0.9))  # type: ignore[arg-type]
    assert len(search.feasible()) == 0
    (blocked,) = search.blocked()
    assert blocked.least == pytest.approx((least,))
    assert search.nearest()[0][1] == pytest.approx(least)
    assert f"the least a_ms is {least:.4g}" in str(blocked)


def test_two_that_can_be_kept_alone_but_not_together(small: SearchSpace, rows: np.ndarray) -> None:
    prices = Pulling(small)
    values = prices.of_all(["a_ms", "b_ms"], rows)
    limits = values.min(axis=0) * 1.1
    assert not (values <= limits).all(axis=1).any()
    wanted = constraints(a_ms=limits[0], b_ms=limits[1])
    search = Feasibility(small, prices, wanted)  # type: ignore[arg-type]
    (blocked,) = search.blocked()
    assert blocked.constraints == tuple(wanted)
    assert blocked.least[0] == pytest.approx(values[values[:, 1] <= limits[1], 0].min())
    assert blocked.least[1] == pytest.approx(values[values[:, 0] <= limits[0], 1].min())
    worst = (values / limits - 1).max(axis=1)
    nearest = np.array([value for _, value in search.nearest()])
    assert (nearest / limits - 1).max() == pytest.approx(worst.min())
    assert "together" in str(blocked)


def test_a_needle_in_the_space_is_found(small: SearchSpace, rows: np.ndarray) -> None:
    prices = Pulling(small)
    values = prices.of_all(["a_ms", "b_ms"], rows)
    middle = rows[np.abs(values[:, 0] - np.median(values[:, 0])).argmin()][None]
    limits = prices.of_all(["a_ms", "b_ms"], middle)[0] + 1e-9
    found = Feasibility(
        small,
        prices,
        constraints(a_ms=limits[0], b_ms=limits[1]),  # type: ignore[arg-type]
    ).feasible()
    assert len(found) and (prices.of_all(["a_ms", "b_ms"], found) <= limits).all()


def test_only_what_blocks_is_named(space: SearchSpace, table: LatencyTable) -> None:
    prices = Prices(space, table, "prefill_b1_t64")
    known = prices.metrics
    objectives = Objectives.parse(
        ("loss",), ("weight_bytes<=1e9", "latency_ms<=0.001", "params<=100", "loss<=1"), known
    )
    with pytest.raises(UserError) as caught:
        feasible_start(space, prices, objectives)
    text = str(caught.value)
    assert "latency_ms<=0.001 alone" in text and "params<=100 alone" in text
    assert "weight_bytes<=1000000000 alone" not in text and "together" not in text
    (least,) = re.findall(r"the least params is ([\d,]+)", text)
    sample = space.sample_genotypes(np.random.default_rng(5), 5000)
    assert 100 < int(least.replace(",", "")) <= prices.of("params", sample).min()


def test_a_start_that_is_found_only_while_blocks_are_looked_for_counts(
    small: SearchSpace, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for an arch is random: one that fails first may succeed later."""
    prices = Pulling(small)
    limits = prices.of_all(["a_ms", "b_ms"], rows[:1])[0] + 1e-9
    objectives = Objectives(("loss",), tuple(constraints(a_ms=limits[0], b_ms=limits[1])))
    search = Feasibility.feasible
    calls: list[int] = []

    def unlucky(self: Feasibility) -> np.ndarray:
        calls.append(1)
        return search(self)[: 0 if len(calls) == 1 else None]

    monkeypatch.setattr(Feasibility, "feasible", unlucky)
    found = feasible_start(small, prices, objectives)  # type: ignore[arg-type]
    assert len(found) and (prices.of_all(["a_ms", "b_ms"], found) <= limits).all()


@pytest.mark.parametrize("limit", [0.0, -5.0])
def test_a_limit_of_zero_or_less_is_impossible_and_not_fulfilled(
    space: SearchSpace, limit: float
) -> None:
    objectives = Objectives(("loss",), (Constraint("params", limit),))
    with pytest.raises(UserError, match="the least params is"):
        feasible_start(space, Prices(space), objectives)


def test_bytes_are_judged_before_anything_is_timed(space: SearchSpace) -> None:
    prices = Prices(space)
    tight = Objectives(("loss",), (Constraint("weight_bytes", 10), Constraint("latency_ms", 1)))
    with pytest.raises(UserError, match="weight_bytes<=10 alone"):
        feasible_start(space, prices, tight)
    loose = Objectives(("loss",), (Constraint("weight_bytes", 2e5), Constraint("latency_ms", 1)))
    found = feasible_start(space, prices, loose)
    assert len(found) and (prices.of("weight_bytes", found) <= 2e5).all()
