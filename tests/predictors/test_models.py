"""The models inside the learned predictors, against slow references. Letters: N, M rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import approx_fprime

from predictors.models.base import Model
from predictors.models.boosting import BoostedTrees, _medians
from predictors.models.conformal import ConformalIntervals
from predictors.models.covariance import Covariance, Linear, Matern, OrnsteinUhlenbeck
from predictors.models.drift import Drift
from predictors.models.gaussian_process import GaussianProcess
from predictors.models.stacking import Candidate, Stack, stacking_weights

FloatArray = NDArray[np.float64]

TERMS: list[Covariance] = [Linear((0, 2)), Matern((0, 1, 2)), OrnsteinUhlenbeck((3,), 0.3)]


def _data(num: int, seed: int = 0, noise: float = 0.02) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1.5, 1.5, (num, 4))
    return X, 3.0 + X[:, 0] + np.sin(2 * X[:, 1]) * X[:, 2] + noise * rng.standard_normal(num)


def _relative(a: FloatArray, b: FloatArray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def test_matern_is_the_textbook_formula() -> None:
    X, _ = _data(7)
    theta = np.array([0.3, 0.1, 0.7, -0.4])
    got = Matern((0, 1, 2)).between(theta, X[:3], X[3:])
    for i in range(3):
        for j in range(4):
            scaled = [(X[i, p] - X[3 + j, p]) / np.exp(theta[1 + p]) for p in range(3)]
            r = np.sqrt(5 * sum(value**2 for value in scaled))
            want = np.exp(2 * theta[0]) * (1 + r + r**2 / 3) * np.exp(-r)
            assert got[i, j] == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.kind)
def test_gradients_are_those_of_finite_differences(term: Covariance) -> None:
    X, _ = _data(9)
    half = np.random.default_rng(1).standard_normal((9, 9))
    S = half + half.T
    theta = term.prior()[0] * 0.3 + 0.1
    value, gradient = term.with_gradient(theta, X)
    np.testing.assert_allclose(value, term.between(theta, X, X), atol=1e-12)
    np.testing.assert_allclose(np.diag(value), term.variance(theta, X), rtol=1e-9)
    numeric = approx_fprime(theta, lambda t: float((S * term.between(t, X, X)).sum()), 1e-6)
    np.testing.assert_allclose(gradient(S), numeric, rtol=1e-4, atol=1e-4)


def test_process_loss_has_the_right_gradient() -> None:
    X, y = _data(12)
    process = GaussianProcess(TERMS)
    theta = process._prior_mean * 0.5
    noise = np.linspace(0.5, 2.0, 12)
    gradient = process._loss(theta, X, y - 3.0, noise)[1]
    numeric = approx_fprime(theta, lambda t: process._loss(t, X, y - 3.0, noise)[0], 1e-6)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-5)


def test_process_predicts_what_the_equations_say() -> None:
    X, y = _data(40)
    X_new, _ = _data(5, seed=3)
    process = GaussianProcess(TERMS).fit(X, y)
    full = process._covariance(process.theta, X, X)
    full += np.diag(np.exp(2 * process.theta[-1]) * process._noise)
    cross = process._covariance(process.theta, X_new, X)
    centre, scale = process._centre, process._scale
    mean, std = process.predict(X_new)
    assert _relative(mean, centre + cross @ np.linalg.solve(full, y - centre)) < 1e-6
    prior = np.diag(process._covariance(process.theta, X_new, X_new))
    variance = prior - np.diag(cross @ np.linalg.solve(full, cross.T))
    variance = scale**2 * (variance + np.exp(2 * process.theta[-1]))
    assert _relative(std, np.sqrt(variance)) < 1e-4


def test_leave_one_out_is_what_leaving_out_gives() -> None:
    X, y = _data(30)
    process = GaussianProcess(TERMS).fit(X, y)
    mean, _ = process.leave_one_out()
    drift = process.leave_one_out_part(2)
    noise = np.exp(2 * process.theta[-1]) * process._noise
    full = process._covariance(process.theta, X, X) + np.diag(noise)
    walk = TERMS[2].between(process.theta[5:7], X, X)
    want, want_drift = np.empty(30), np.empty(30)
    for i in range(30):
        rest = np.arange(30) != i
        dual = np.linalg.solve(full[np.ix_(rest, rest)], y[rest] - process._centre)
        want[i] = process._centre + full[i, rest] @ dual
        want_drift[i] = walk[i, rest] @ dual
    assert _relative(mean, want) < 1e-6
    np.testing.assert_allclose(drift, want_drift, atol=1e-5)


def test_process_learns_and_outliers_hardly_move_it() -> None:
    X, y = _data(120)
    X_new, truth = _data(200, seed=4, noise=0.0)
    clean = GaussianProcess([Matern((0, 1, 2, 3))]).fit(X, y).predict(X_new)[0]
    assert np.std(clean - truth) < 0.1 * np.std(truth)
    y[::10] += 3.0
    spoiled = GaussianProcess([Matern((0, 1, 2, 3))]).fit(X, y).predict(X_new)[0]
    assert np.std(spoiled - truth) < 0.2 * np.std(truth)


def test_medians_of_leaves() -> None:
    rng = np.random.default_rng(0)
    leaf_of, residual = rng.integers(1, 5, 31), rng.standard_normal(31)
    got = _medians(leaf_of, residual, 7)
    for node in range(7):
        own = residual[leaf_of == node]
        assert got[node] == pytest.approx(np.median(own) if len(own) else 0.0)


def test_boosted_trees_walk_as_scikit_learn_does() -> None:
    X, y = _data(150)
    trees = BoostedTrees(seed=2).fit(X, y)
    mean, std = trees.predict(X)
    assert np.std(mean - y) == pytest.approx(std[0], rel=1e-9)
    X_new, truth = _data(100, seed=5, noise=0.0)
    assert np.mean(np.abs(trees.predict(X_new)[0] - truth)) < 0.5 * np.mean(np.abs(truth - 3.0))


@pytest.mark.parametrize(("num", "level"), [(19, 0.9), (50, 0.8), (400, 0.9)])
def test_conformal_intervals_cover(num: int, level: float) -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        scores = rng.exponential(size=num + 1) - 0.7
        intervals = ConformalIntervals.of(scores[:-1], np.ones(num))
        low, high = intervals.around(np.zeros(1), np.ones(1), level)
        held.append(low[0] <= scores[-1] <= high[0])
    assert level - 0.05 < np.mean(held) < level + 0.06


def test_conformal_intervals_of_few_rows_are_finite_and_wide() -> None:
    residual = np.array([-1.0, 0.5, 1.0])
    low, high = ConformalIntervals.of(residual, np.ones(3)).around(np.zeros(1), np.ones(1), 0.9)
    assert -20 < low[0] < -1.0
    assert 1.0 < high[0] < 20


def test_drift_finds_states() -> None:
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (150, 2))
    order = np.sort(rng.uniform(0, 1000, 150))
    state = np.where((order > 300) & (order < 650), 0.4, 0.0)
    y = X[:, 0] + state + 0.02 * rng.standard_normal(150)
    drift = Drift().fit(X, y, order)
    inner = np.abs(order[:, None] - [300, 650]).min(axis=1) > 20
    centred = drift.held_out - np.median(drift.held_out[state == 0])
    assert np.abs(centred - state)[inner].mean() < 0.05
    found = drift.at(np.array([100.0, 500.0]))
    assert found[1] - found[0] == pytest.approx(0.4, abs=0.05)


def test_stack_follows_the_better_model() -> None:
    X, y = _data(80)
    good = Candidate("good", slice(0, 4), lambda: GaussianProcess([Matern((0, 1, 2, 3))]))
    blind = Candidate("blind", slice(3, 4), lambda: GaussianProcess([Matern((0,))]))
    stack = Stack().fit([blind, good], X, y)
    assert stack.names == ["good"]
    np.testing.assert_allclose(stack.weights, [1.0])
    means = np.stack([y, y + 0.1, y + 0.1])
    np.testing.assert_allclose(stacking_weights(means, y), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(stacking_weights(means[1:], y), [0.5, 0.5])


@pytest.mark.parametrize(
    "model",
    [GaussianProcess(TERMS), BoostedTrees(1)],
    ids=["process", "trees"],
)
def test_state_is_plain_and_predicts_the_same(model: Model) -> None:
    X, y = _data(40)
    X_new, _ = _data(33, seed=6)
    fitted = model.fit(X, y)
    state = fitted.state()
    plain = {key: value for key, value in state.items() if not isinstance(value, np.ndarray)}
    arrays = {key: value.copy() for key, value in state.items() if isinstance(value, np.ndarray)}
    again = type(model).from_state({**json.loads(json.dumps(plain)), **arrays})
    for one, other in zip(fitted.predict(X_new), again.predict(X_new), strict=True):
        np.testing.assert_array_equal(one, other)
