"""The label-free combination of several metrics' orders."""

from __future__ import annotations

import logging
import math
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kendalltau

from predictors.rank_aggregation import COMBINED, agreement, rank_aggregate
from predictors.zero_cost import METRICS
from searchspace.errors import UserError

TRUTH = np.random.default_rng(7).normal(size=200)


def noisy(seed: int, noise: float = 0.7) -> NDArray[np.float64]:
    return TRUTH + noise * np.random.default_rng(seed).normal(size=len(TRUTH))


def tau(scores: NDArray[np.float64]) -> float:
    return float(kendalltau(scores, TRUTH).statistic)


class TestNonsense:
    """Metrics that agree are not spoilt by ones that do not."""

    GOOD: ClassVar = {"a": noisy(1), "b": noisy(2), "c": noisy(3)}

    def test_together_they_are_better_than_alone(self) -> None:
        assert tau(rank_aggregate(self.GOOD)) > max(map(tau, self.GOOD.values())) + 0.05

    @pytest.mark.parametrize("seed", range(5))
    def test_chance(self, seed: int) -> None:
        chance = np.random.default_rng(100 + seed).normal(size=len(TRUTH))
        spoilt = rank_aggregate({**self.GOOD, "chance": chance})
        assert tau(spoilt) > tau(rank_aggregate(self.GOOD)) - 0.02

    def test_the_contrary_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            spoilt = rank_aggregate({**self.GOOD, "contrary": -noisy(4)})
        np.testing.assert_allclose(spoilt, rank_aggregate(self.GOOD), atol=1e-9)
        assert "'contrary' left out: it contradicts the others" in caplog.text

    def test_better_ones_count_more(self) -> None:
        weights = agreement([noisy(1, 0.2), noisy(2, 0.2), noisy(3, 2.0)])
        assert weights.sum() == pytest.approx(1.0)
        assert weights[0] > 1.5 * weights[2]
        assert weights[1] > 1.5 * weights[2]

    def test_where_none_agree_all_count_alike(self) -> None:
        scores = [[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]
        np.testing.assert_allclose(agreement(scores), 1 / 3)

    def test_weights_are_correlations_with_the_weighed_others(self) -> None:
        scores = np.stack([noisy(s, 0.3 * s) for s in (1, 2, 3, 4)])
        scores = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
        weights = agreement(scores)
        others = [sum(weights[j] * scores[j] for j in range(4) if j != i) for i in range(4)]
        found = np.array([np.corrcoef(scores[i], others[i])[0, 1] for i in range(4)])
        np.testing.assert_allclose(found / found.sum(), weights, rtol=1e-6)

    @given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 12))
    def test_always_finite(self, seed: int, num_metrics: int, num_archs: int) -> None:
        rng = np.random.default_rng(seed)
        scores = {str(m): rng.permutation(num_archs).astype(float) for m in range(num_metrics)}
        assert np.isfinite(rank_aggregate(scores)).all()


def test_the_default_few_are_metrics() -> None:
    assert set(COMBINED) <= set(METRICS)


class TestRankAggregate:
    def test_mean_of_normal_scores(self) -> None:
        aggregated = rank_aggregate({"a": [1.0, 2.0, 30.0], "b": [0.0, -5.0, 7.0]})
        low, middle, high = (NormalDist().inv_cdf((r - 0.5) / 3) for r in (1, 2, 3))
        expected = [(low + middle) / 2, (middle + low) / 2, high]
        np.testing.assert_allclose(aggregated, expected, atol=1e-12)

    def test_ties_share_their_rank(self) -> None:
        aggregated = rank_aggregate({"a": [1.0, 1.0, 2.0, 2.0]})
        assert aggregated[0] == aggregated[1] == -aggregated[2] == -aggregated[3]

    def test_only_ranks_count(self) -> None:
        values = np.random.default_rng(0).normal(size=20)
        np.testing.assert_array_equal(
            rank_aggregate({"a": values}), rank_aggregate({"a": np.exp(9 * values)})
        )

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ([3.0, 3.0, 3.0], "the same for all"),
            ([1.0, math.nan, 2.0], "not finite for 1"),
            ([1.0, -math.inf, math.inf], "not finite for 2"),
        ],
    )
    def test_useless_metrics_are_dropped_and_reported(
        self, bad: list[float], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        good = [3.0, 1.0, 2.0]
        with caplog.at_level(logging.WARNING):
            aggregated = rank_aggregate({"good": good, "bad": bad})
        np.testing.assert_array_equal(aggregated, rank_aggregate({"good": good}))
        assert "'bad'" in caplog.text
        assert reason in caplog.text

    def test_nothing_left(self) -> None:
        with pytest.raises(UserError, match="none of the metrics a tells"):
            rank_aggregate({"a": [1.0, 1.0]})

    def test_different_lengths(self) -> None:
        with pytest.raises(UserError, match="different shapes"):
            rank_aggregate({"a": [1.0, 2.0], "b": [1.0]})
