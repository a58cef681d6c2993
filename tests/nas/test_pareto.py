from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.pareto import (
    greedy_hypervolume_subset,
    hypervolume,
    hypervolume_gains,
    knee_index,
    non_dominated,
    normalise,
)


def slow_front(F: np.ndarray) -> list[bool]:
    def dominates(a: np.ndarray, b: np.ndarray) -> bool:
        return bool((a <= b).all() and (a < b).any())

    clean = [row for row in F if not np.isnan(row).any()]
    return [
        not np.isnan(row).any() and not any(dominates(other, row) for other in clean) for row in F
    ]


def slow_volume(F: np.ndarray, reference: np.ndarray) -> float:
    """Count the cells of the grid that the points' own coordinates span."""
    axes = [np.unique(np.append(F[:, m][F[:, m] < r], r)) for m, r in enumerate(reference)]
    total = 0.0
    for cell in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = np.array([axis[i] for axis, i in zip(axes, cell, strict=True)])
        high = np.array([axis[i + 1] for axis, i in zip(axes, cell, strict=True)])
        if (low >= F).all(axis=1).any():
            total += float(np.prod(high - low))
    return total


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_non_dominated_equals_pairwise_comparison(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for _ in range(30):
        F = rng.integers(0, 6, (25, num_objectives)).astype(float)
        F[rng.random(F.shape) < 0.03] = np.nan
        assert non_dominated(F).tolist() == slow_front(F)


def test_non_dominated_keeps_copies_and_drops_nan() -> None:
    F = [[1.0, 2.0], [1.0, 2.0], [np.nan, 0.0], [2.0, 2.0]]
    assert non_dominated(F).tolist() == [True, True, False, False]
    assert non_dominated(np.empty((0, 2))).tolist() == []
    assert non_dominated([[np.nan, np.nan]]).tolist() == [False]


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_hypervolume_equals_cell_count(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    reference = np.full(num_objectives, 0.9)
    for size in (1, 2, 5, 7):
        F = rng.random((size, num_objectives))
        assert hypervolume(F, reference) == pytest.approx(slow_volume(F, reference), abs=1e-12)


def test_hypervolume_ignores_nan_and_points_outside() -> None:
    F = [[0.5, 0.5], [np.nan, 0.0], [2.0, -5.0], [1.0, 0.0]]
    assert hypervolume(F, [1.0, 1.0]) == pytest.approx(0.25)
    assert hypervolume(np.empty((0, 2)), [1.0, 1.0]) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3), st.integers(0, 8), st.integers(0, 2**16))
def test_gain_is_the_difference_of_volumes(num_objectives: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    have, new = rng.random((size, num_objectives)), rng.random((6, num_objectives)) * 1.2
    reference = np.ones(num_objectives)
    expected = [
        hypervolume(np.vstack([have, row]), reference) - hypervolume(have, reference) for row in new
    ]
    np.testing.assert_allclose(hypervolume_gains(have, new, reference), expected, atol=1e-12)


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_greedy_subset_equals_plain_greedy(num_objectives: int) -> None:
    rng = np.random.default_rng(7 + num_objectives)
    reference = np.ones(num_objectives)
    have, new = rng.random((3, num_objectives)), rng.random((30, num_objectives))
    picked: list[int] = []
    base = have
    for _ in range(6):
        gains = [
            hypervolume(np.vstack([base, row]), reference) - hypervolume(base, reference)
            for row in new
        ]
        if max(gains) <= 1e-12:
            break
        picked.append(int(np.argmax(gains)))
        base = np.vstack([base, new[picked[-1]]])
    assert greedy_hypervolume_subset(have, new, reference, 6) == picked


def test_greedy_subset_skips_worthless_candidates() -> None:
    assert greedy_hypervolume_subset([[0.0, 0.0]], [[0.5, 0.5], [np.nan, 0]], [1, 1], 5) == []
    assert greedy_hypervolume_subset(np.empty((0, 2)), np.empty((0, 2)), [1, 1], 5) == []


def test_normalise_maps_ideal_to_zero_and_nadir_to_one() -> None:
    unit = normalise([[1.0, 5.0], [3.0, 5.0]], ideal=[1.0, 5.0], nadir=[3.0, 5.0])
    np.testing.assert_allclose(unit, [[0.0, 0.0], [1.0, 0.0]])


def test_knee_is_the_bend_and_never_a_dominated_row() -> None:
    F = np.array([[0.0, 10.0], [1.0, 2.0], [1.5, 9.0], [9.0, 0.5], [10.0, 0.0], [np.nan, 0.0]])
    assert knee_index(F) == 1
    assert knee_index(F * [1000.0, 0.001]) == 1
    assert knee_index([[3.0, 3.0]]) == 0
    corners = np.vstack([np.eye(3), np.full((1, 3), 0.1), np.full((1, 3), 0.3)])
    assert knee_index(corners) == 3
    with pytest.raises(ValueError, match="without NaN"):
        knee_index([[np.nan, 1.0]])
