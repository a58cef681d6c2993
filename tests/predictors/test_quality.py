"""The quality regressor: what it learns, what it takes and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.utils.estimator_checks import estimator_checks_generator

import predictors
from predictors.encodings import Gene, GeneEncoding
from predictors.models.saving import write_model
from predictors.quality import QualityRegressor
from searchspace.errors import UserError

NUM_LAYERS = 6


def draw(rng: np.random.Generator, num: int) -> np.ndarray:
    """Widths and per-layer sizes, NaN for layers that are not there."""
    depth = rng.integers(3, NUM_LAYERS + 1, num)
    sizes = rng.choice([256.0, 512.0, 1024.0], (num, NUM_LAYERS))
    sizes[np.arange(NUM_LAYERS) >= depth[:, None]] = np.nan
    return np.column_stack([rng.choice([64.0, 128.0, 192.0], num), sizes])


def score(X: np.ndarray) -> np.ndarray:
    return np.asarray(60 + 4 * np.log(X[:, 0] / 64) + np.nansum(np.sqrt(X[:, 1:]) / 16, axis=1))


def tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(kendalltau(a, b).statistic)


def scikit_checks() -> list[Any]:
    """scikit-learn's checks; repetitions with memory-mapped arrays and other layouts are slow."""
    cases = []
    for estimator, check in estimator_checks_generator(QualityRegressor(), mark="skip"):
        repeated = bool({"readonly_memmap", "X_dtype"} & getattr(check, "keywords", {}).keys())
        marks = [pytest.mark.slow] if repeated else []
        name = getattr(check, "func", check).__name__
        cases.append(pytest.param(estimator, check, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("estimator", "check"), scikit_checks())
def test_scikit_learns_own_checks(estimator: QualityRegressor, check: object) -> None:
    check(estimator)  # type: ignore[operator]


def test_masked_genes_of_few_labels_rank_the_rest() -> None:
    rng = np.random.default_rng(0)
    train, test = draw(rng, 40), draw(rng, 300)
    model = QualityRegressor().fit(train, score(train) + 0.2 * rng.normal(size=40))
    assert tau(model.predict(test), score(test)) > 0.8


def test_scaled_columns_are_learned_from_twenty_labels() -> None:
    rng = np.random.default_rng(1)
    genes = [Gene("width", "categorical", (1, 2, 3))]
    genes += [Gene(f"layers.{i}.ffn", "categorical", (1, 2, 3, 4)) for i in range(12)]
    levels = np.hstack([rng.integers(0, 3, (220, 1)), rng.integers(0, 4, (220, 12))])
    loss = 4 - 0.5 * levels[:, 0] - 0.04 * (1 + levels[:, 0]) * levels[:, 1:].sum(axis=1)
    encoding = GeneEncoding(genes)
    X = encoding.encode(levels)
    model = QualityRegressor(encoding.prior_scale, encoding.groups).fit(X[:20], loss[:20])
    assert tau(model.predict(X[20:]), loss[20:]) > 0.9


def test_a_column_that_ranks_well_alone_is_trusted_at_once() -> None:
    rng = np.random.default_rng(2)
    X = rng.normal(size=(420, 21))
    y = X[:, 0].copy()
    X[:, 0] = np.exp(3 * (X[:, 0] + 0.2 * rng.normal(size=420)))
    model = QualityRegressor().fit(X[:20], y[:20])
    alone = tau(X[20:, 0], y[20:])
    assert tau(model.predict(X[20:]), y[20:]) > alone - 0.12


def test_collapsed_runs_do_not_spoil_the_order_and_units_come_back() -> None:
    rng = np.random.default_rng(3)
    train, test = draw(rng, 60), draw(rng, 300)
    y = score(train)
    y[:3] = [1.0, 2.0, -300.0]
    model = QualityRegressor().fit(train, y)
    predicted = model.predict(test)
    assert tau(predicted, score(test)) > 0.75
    assert abs(np.median(predicted) - np.median(score(test))) < 1.0


def test_order_is_the_same_for_loss_accuracy_and_any_unit() -> None:
    rng = np.random.default_rng(4)
    train, test = draw(rng, 30), draw(rng, 100)
    up = QualityRegressor().fit(train, score(train)).predict(test)
    down = QualityRegressor().fit(train, -1e-3 * score(train)).predict(test)
    assert tau(up, -down) > 0.97
    np.testing.assert_allclose(down, -1e-3 * up, rtol=1e-2)


def test_deviation_covers_the_errors_and_tells_noise_apart() -> None:
    rng = np.random.default_rng(5)
    train, test = draw(rng, 80), draw(rng, 400)
    widths = []
    for noise in (0.1, 1.0):
        y = score(train) + noise * rng.normal(size=80)
        truth = score(test) + noise * rng.normal(size=400)
        mean, std = QualityRegressor().fit(train, y).predict(test, return_std=True)
        assert 0.85 < np.mean(np.abs(mean - truth) < 2 * std) <= 1.0
        widths.append(np.median(std))
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("num", [1, 2, 3, 30, 60])
def test_saved_models_predict_the_same_to_the_last_bit(num: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    train, test = draw(rng, num), draw(rng, 50)
    model = QualityRegressor().fit(train, score(train) + 2.0 * rng.normal(size=num))
    model.save(tmp_path / "model")
    for again, fresh in zip(
        QualityRegressor.load(tmp_path / "model").predict(test, return_std=True),
        model.predict(test, return_std=True),
        strict=True,
    ):
        np.testing.assert_array_equal(again, fresh)
        assert np.isfinite(fresh).all()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "other", "latency", {"weights": np.zeros(3)})
    with pytest.raises(UserError, match="not a quality predictor"):
        QualityRegressor.load(tmp_path / "other")


@pytest.mark.parametrize("num", [1, 5, 60])
def test_equal_labels_predict_that_value(num: int) -> None:
    X = np.random.default_rng(7).normal(size=(num, 3))
    mean, std = QualityRegressor().fit(X, np.full(num, 3.5)).predict(X, return_std=True)
    np.testing.assert_allclose(mean, 3.5)
    np.testing.assert_array_equal(std, 0.0)


def test_columns_without_any_information_predict_the_middle() -> None:
    X = np.column_stack([np.full(20, np.nan), np.ones(20)])
    y = np.arange(20.0)
    assert y.min() < QualityRegressor().fit(X, y).predict(X[:1])[0] < y.max()


def test_values_never_seen_get_a_prediction_near_the_known_ones() -> None:
    rng = np.random.default_rng(8)
    train = draw(rng, 60)
    y = score(train)
    model = QualityRegressor().fit(train, y)
    strange = train[:4].copy()
    strange[0, 0], strange[1, 1], strange[2] = 1e12, -1e12, np.nan
    strange[3, 0] = np.nan
    predicted = model.predict(strange)
    assert (predicted > y.min() - np.ptp(y)).all()
    assert (predicted < y.max() + np.ptp(y)).all()


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.ones((4, 2)), [1.0, np.nan, 2.0, 3.0], "NaN"),
        (np.ones((4, 2)), [1.0, np.inf, 2.0, 3.0], "infinity"),
        (np.ones((4, 2)), [1.0, 2.0, 3.0], "inconsistent numbers of samples"),
        (np.full((4, 2), np.inf), [1.0, 2.0, 3.0, 4.0], "infinity"),
        (np.ones(4), [1.0, 2.0, 3.0, 4.0], "2D array"),
        (np.ones((0, 2)), [], "0 sample"),
    ],
)
def test_wrong_input_says_what_is_wrong(X: np.ndarray, y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityRegressor().fit(X, y)


def test_wrong_number_of_columns_scales_or_groups_is_an_error() -> None:
    X, y = np.eye(5), np.arange(5.0)
    with pytest.raises(ValueError, match="expecting 5 features"):
        QualityRegressor().fit(X, y).predict(X[:, :3])
    with pytest.raises(UserError, match="one non-negative number per feature"):
        QualityRegressor(prior_scale=[1.0, 2.0]).fit(X, y)
    with pytest.raises(UserError, match="one name per feature"):
        QualityRegressor(groups=["a"]).fit(X, y)


def test_the_same_seed_gives_the_same_model() -> None:
    rng = np.random.default_rng(9)
    train, test = draw(rng, 60), draw(rng, 20)
    y = score(train) + rng.normal(size=60)
    first, second = (QualityRegressor(random_state=3).fit(train, y).predict(test) for _ in "ab")
    np.testing.assert_array_equal(first, second)


def test_the_package_exports_it_but_does_not_import_it() -> None:
    assert predictors.QualityRegressor is QualityRegressor
    with pytest.raises(AttributeError, match="Regresor"):
        predictors.QualityRegresor  # noqa: B018
    program = "import predictors, sys; assert not {'sklearn', 'torch'} & set(sys.modules)"
    root = Path(predictors.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
