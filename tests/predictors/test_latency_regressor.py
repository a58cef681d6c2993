"""LatencyRegressor on devices made here: accuracy, intervals, drift, transfer, files, mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

import predictors
from predictors.latency import LatencyRegressor
from predictors.models.saving import write_model
from searchspace.errors import UserError

FloatArray = NDArray[np.float64]


def _networks(num: int, seed: int) -> FloatArray:
    """Depth, width, FFN width, heads and a column that never varies, shape (num, 5)."""
    rng = np.random.default_rng(seed)
    depth, heads = rng.integers(1, 7, num), rng.integers(1, 9, num)
    width, ffn = rng.choice([256, 384, 512], num), rng.choice([512, 1024, 2048], num)
    return np.column_stack([depth, width, ffn, heads, np.full(num, 6)]).astype(float)


def _latency_ms(X: FloatArray, slowness: float = 1.0, seed: int = 0) -> FloatArray:
    depth, width, ffn, heads, _ = X.T
    work = 2.0 + depth * (0.8 + 1e-5 * slowness * width * ffn + 0.02 * heads)
    noise = np.random.default_rng(seed).standard_normal(len(X))
    return np.asarray(work * np.exp(0.01 * noise))


def _mape(model: LatencyRegressor, X: FloatArray, y: FloatArray) -> float:
    return float(100 * np.mean(np.abs(model.predict(X) / y - 1)))


def test_twenty_samples_are_enough_for_a_simple_device() -> None:
    X, X_test = _networks(20, 1), _networks(300, 2)
    model = predictors.LatencyRegressor().fit(X, _latency_ms(X))
    assert _mape(model, X_test, _latency_ms(X_test, seed=5)) < 6.0
    again = LatencyRegressor().fit(X, _latency_ms(X))
    np.testing.assert_array_equal(model.predict(X_test), again.predict(X_test))


def test_intervals_cover_and_trees_take_part() -> None:
    X, X_test = _networks(120, 1), _networks(500, 2)
    model = LatencyRegressor().fit(X, _latency_ms(X))
    y = _latency_ms(X_test, seed=5)
    assert _mape(model, X_test, y) < 1.5
    mean, (low, high) = model.predict(X_test, return_interval=True)
    assert (low <= mean).all() and (mean <= high).all()
    assert 0.82 < np.mean((low <= y) & (y <= high)) < 0.98
    _, (narrow_low, narrow_high) = model.predict(X_test, return_interval=True, level=0.5)
    assert (narrow_low >= low).all() and (narrow_high <= high).all()


def test_known_order_takes_the_drift_out() -> None:
    X = _networks(160, 1)
    order = np.arange(160.0)
    y = _latency_ms(X) * np.where((order > 50) & (order < 110), 1.3, 1.0)
    train, test = np.arange(160) % 2 == 0, np.arange(160) % 2 == 1
    model = LatencyRegressor().fit(X[train], y[train], order=order[train])
    told = np.abs(model.predict(X[test], order=order[test]) / y[test] - 1)
    blind = np.abs(LatencyRegressor().fit(X[train], y[train]).predict(X[test]) / y[test] - 1)
    assert told.mean() < 0.4 * blind.mean()
    _, (low, high) = model.predict(X[test], True, order=order[test])
    _, (usual_low, usual_high) = model.predict(X[test], True)
    assert np.median(high / low) < 0.9 * np.median(usual_high / usual_low)


def test_other_devices_help() -> None:
    X, X_test = _networks(8, 1), _networks(300, 2)
    sources = []
    for slowness in (0.5, 2.0):
        known = _networks(60, 7)
        sources.append(LatencyRegressor().fit(known, _latency_ms(known, slowness)))
    y = _latency_ms(X_test, seed=5)
    alone = LatencyRegressor().fit(X, _latency_ms(X))
    helped = LatencyRegressor().fit(X, _latency_ms(X), sources=sources)
    assert _mape(helped, X_test, y) < 0.6 * _mape(alone, X_test, y)


def test_saved_model_predicts_the_same_to_the_last_bit(tmp_path: Path) -> None:
    X, X_test, order = _networks(40, 1), _networks(50, 2), np.arange(40.0)
    y = _latency_ms(X)
    sources = [LatencyRegressor().fit(X, 2 * y), LatencyRegressor().fit(X[:1], y[:1])]
    model = LatencyRegressor().fit(X, y, order=order, sources=sources)
    model.save(tmp_path / "model")
    again = LatencyRegressor.load(tmp_path / "model")
    for places in (None, np.linspace(0, 40, 50)):
        mean, ends = model.predict(X_test, True, order=places)
        other, other_ends = again.predict(X_test, True, order=places)
        np.testing.assert_array_equal(mean, other)
        np.testing.assert_array_equal(ends, other_ends)
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == (tmp_path / "model").stat().st_size


def test_trees_are_saved(tmp_path: Path) -> None:
    X = _networks(110, 1)
    # A slow path for some sizes, which no smooth function of them follows.
    y = _latency_ms(X) * np.where(((X[:, 0] + X[:, 3]) % 3 == 0) & (X[:, 1] > 300), 3.0, 1.0)
    model = LatencyRegressor().fit(X, y)
    assert "boosted trees" in model.stack_.names
    model.save(tmp_path / "model")
    again = LatencyRegressor.load(tmp_path / "model")
    np.testing.assert_array_equal(model.predict(X), again.predict(X))


def test_foreign_sources_work_but_are_not_saved(tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    X = _networks(15, 1)
    y = _latency_ms(X)
    model = LatencyRegressor().fit(X, y, sources=[LinearRegression().fit(X, y)])
    assert np.isfinite(model.predict(X)).all()
    # Beyond the training rows the line crosses zero, where there is no logarithm.
    beyond = np.array([[0.0, -4000.0, 0.0, 0.0, 6.0]])
    assert np.isfinite(model.predict(beyond)).all()
    with pytest.raises(UserError, match=r"sources\[0\] is a LinearRegression"):
        model.save(tmp_path / "model")


def test_missing_features_and_unseen_values() -> None:
    X = _networks(60, 1)
    y = _latency_ms(X)
    X[::3, 3] = np.nan
    X_new = X[:6].copy()
    X_new[0], X_new[1, 1], X_new[2, 4] = np.nan, 1e4, -3.0
    model = LatencyRegressor().fit(X, y)
    mean, (low, high) = model.predict(X_new, return_interval=True)
    assert np.isfinite([mean, low, high]).all() and (mean > 0).all()


@pytest.mark.parametrize("num", [1, 2])
def test_one_or_two_samples_predict_their_middle(num: int) -> None:
    X = _networks(num, 1)
    y = np.array([4.0, 9.0])[:num]
    mean, (low, high) = LatencyRegressor().fit(X, y).predict(_networks(3, 2), True)
    np.testing.assert_allclose(mean, [4.0, 6.0][num - 1])
    np.testing.assert_array_equal([low, high], [mean, mean])


def test_constant_targets_or_features_predict_the_middle() -> None:
    X = _networks(30, 1)
    same = LatencyRegressor().fit(X, np.full(30, 7.0))
    np.testing.assert_allclose(same.predict(_networks(5, 2)), 7.0)
    blank = LatencyRegressor().fit(np.ones((30, 2)), np.linspace(1.0, 3.0, 30))
    assert 1.5 < blank.predict(np.ones((1, 2)))[0] < 2.5


def test_targets_that_are_not_positive_are_taken_as_they_are() -> None:
    X = _networks(60, 1)
    y = _latency_ms(X) - 20.0
    X_test = _networks(100, 2)
    error = LatencyRegressor().fit(X, y).predict(X_test) - (_latency_ms(X_test) - 20.0)
    assert np.abs(error).mean() < 0.2 * np.std(y)


def test_mistakes_are_named() -> None:
    X = _networks(12, 1)
    y = _latency_ms(X)
    with pytest.raises(ValueError, match="NaN"):
        LatencyRegressor().fit(X, np.where(y > 9, np.nan, y))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        LatencyRegressor().fit(X, y[:5])
    with pytest.raises(UserError, match="order has shape"):
        LatencyRegressor().fit(X, y, order=np.arange(5))
    with pytest.raises(UserError, match="finite=False"):
        LatencyRegressor().fit(X, y, order=np.full(12, np.nan))
    model = LatencyRegressor().fit(X, y)
    with pytest.raises(ValueError, match="expecting 5 features"):
        model.predict(X[:, :3])
    with pytest.raises(UserError, match="level=1"):
        model.predict(X, True, level=1)
    with pytest.raises(UserError, match="not to fit"):
        model.predict(X, order=np.arange(12))

    class Wrong:
        def predict(self, X: FloatArray) -> FloatArray:
            return np.ones((len(X), 2))

    with pytest.raises(UserError, match=r"sources\[0\] predicts shape \(12, 2\)"):
        LatencyRegressor().fit(X, y, sources=[Wrong()])


def test_a_file_with_parts_missing_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "latency", {"random_state": 0, "num_features": 3})
    with pytest.raises(UserError, match="damaged"):
        LatencyRegressor.load(tmp_path / "model")


def test_is_a_scikit_learn_estimator() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(clone(LatencyRegressor()))
