from __future__ import annotations

import numpy as np
import pytest

from predictors.encodings import Gene, GeneEncoding
from predictors.models.posterior import Posterior
from predictors.models.prior_ridge import PriorRidge
from searchspace.errors import UserError

NUM_LAYERS = 12
GENES = [
    Gene("width", "categorical", (1, 2, 3)),
    *[Gene(f"layers.{i}.ffn", "categorical", (1, 2, 3, 4)) for i in range(NUM_LAYERS)],
]


def draw_levels(rng: np.random.Generator, count: int) -> np.ndarray:
    share = rng.random((count, 1))
    ffn = np.clip(rng.normal(share * 4, 1.0, (count, NUM_LAYERS)), 0, 3.99).astype(int)
    return np.hstack([rng.integers(0, 3, (count, 1)), ffn])


def loss_of(levels: np.ndarray) -> np.ndarray:
    width, ffn = levels[:, 0], levels[:, 1:]
    importance = np.linspace(1.3, 0.7, NUM_LAYERS)
    return np.asarray(
        4.0 - 0.5 * width - 0.04 * ((1 + 0.3 * width)[:, None] * ffn * importance).sum(1)
    )


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_prior_scales_beat_standardised_features_at_twenty_labels() -> None:
    rng = np.random.default_rng(0)
    train, test = draw_levels(rng, 20), draw_levels(rng, 400)
    encoding = GeneEncoding(GENES)
    X, T = encoding.encode(train), encoding.encode(test)
    prior = PriorRidge(encoding.prior_scale, encoding.groups).fit(X, loss_of(train))
    spread = X.std(axis=0)
    flat = PriorRidge(np.where(spread > 0, 1 / np.maximum(spread, 1e-9), 0.0))
    flat.fit(X, loss_of(train))
    assert rmse(prior.predict(T)[0], loss_of(test)) < 0.4 * rmse(flat.predict(T)[0], loss_of(test))


def test_mean_and_std_equal_the_gaussian_process_formula() -> None:
    """The posterior of a linear model is the GP posterior with the kernel phi phi^T."""
    rng = np.random.default_rng(1)
    X, T = rng.normal(size=(15, 6)), rng.normal(size=(9, 6))
    y = X @ rng.normal(size=6) + 0.1 * rng.normal(size=15)
    model = PriorRidge(np.linspace(1, 0.2, 6)).fit(X, y)
    scale, centre = np.linspace(1, 0.2, 6), X.mean(axis=0)
    phi, star = (X - centre) * scale, (T - centre) * scale
    posterior = model._posterior
    z = (y - y.mean()) / y.std()
    inverse = np.linalg.inv(phi @ phi.T + posterior.ridge * np.eye(15))
    mean = star @ phi.T @ inverse @ z * y.std() + y.mean()
    cov = posterior.variance * (star @ star.T - star @ phi.T @ inverse @ phi @ star.T)
    got_mean, got_std = model.predict(T)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-8)
    np.testing.assert_allclose(got_std, np.sqrt(np.diag(cov)) * y.std(), rtol=1e-6)


def test_leave_one_out_equals_refitting_without_each_row() -> None:
    rng = np.random.default_rng(2)
    phi, z = rng.normal(size=(12, 5)), rng.normal(size=12)
    posterior = Posterior.of(phi, z)
    errors = []
    for i in range(12):
        keep = np.arange(12) != i
        kernel = phi[keep] @ phi[keep].T + posterior.ridge * np.eye(11)
        errors.append(z[i] - phi[i] @ phi[keep].T @ np.linalg.solve(kernel, z[keep]))
    assert posterior.leave_one_out == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))))


def test_draws_have_the_posterior_mean_and_spread() -> None:
    rng = np.random.default_rng(3)
    X, T = rng.normal(size=(20, 8)), rng.normal(size=(5, 8))
    model = PriorRidge().fit(X, X[:, 0] + 0.3 * rng.normal(size=20))
    mean, std = model.predict(T)
    sheets = model.predict_draws(T, model.draw(rng, 6000))
    np.testing.assert_allclose(sheets[:, 0], mean)
    np.testing.assert_allclose(sheets[:, 1:].mean(axis=1), mean, atol=0.05 * std.max())
    np.testing.assert_allclose(sheets[:, 1:].std(axis=1), std, rtol=0.05)


def test_std_grows_away_from_the_labels_and_covers_the_errors() -> None:
    rng = np.random.default_rng(4)
    train, test = draw_levels(rng, 40), draw_levels(rng, 500)
    encoding = GeneEncoding(GENES)
    noisy = loss_of(train) + 0.02 * rng.normal(size=40)
    model = PriorRidge(encoding.prior_scale, encoding.groups)
    model.fit(encoding.encode(train), noisy)
    mean, std = model.predict(encoding.encode(test))
    assert np.mean(np.abs(mean - loss_of(test)) < 2 * std) > 0.85
    assert model.predict(encoding.encode(train))[1].mean() < std.mean()


def test_plenty_of_labels_on_a_bent_target_turns_on_the_nonlinear_term() -> None:
    rng = np.random.default_rng(5)
    X, T = rng.uniform(-1, 1, (200, 2)), rng.uniform(-1, 1, (300, 2))

    def bent(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.sin(3 * x[:, 0]) * np.cos(2 * x[:, 1]))

    few = PriorRidge().fit(X[:40], bent(X[:40]))
    many = PriorRidge().fit(X, bent(X))
    assert few._rbf is None and many._rbf is not None
    assert rmse(many.predict(T)[0], bent(T)) < 0.2 * rmse(few.predict(T)[0], bent(T))


def test_a_collapsed_run_does_not_spoil_the_rest() -> None:
    rng = np.random.default_rng(6)
    train, test = draw_levels(rng, 40), draw_levels(rng, 300)
    encoding = GeneEncoding(GENES)
    y = loss_of(train)
    clean = PriorRidge(encoding.prior_scale).fit(encoding.encode(train), y)
    y_bad = y.copy()
    y_bad[3] = 1e6
    bad = PriorRidge(encoding.prior_scale).fit(encoding.encode(train), y_bad)
    T = encoding.encode(test)
    spread = loss_of(test).std()
    assert rmse(clean.predict(T)[0], loss_of(test)) < 0.1 * spread
    assert rmse(bad.predict(T)[0], loss_of(test)) < 1.0 * spread


def test_nan_labels_are_left_out_and_nothing_left_is_an_error() -> None:
    X = np.arange(10.0)[:, None]
    y = 2 * X[:, 0]
    y[4] = np.nan
    np.testing.assert_allclose(PriorRidge().fit(X, y).predict([[20.0]])[0], 40.0, rtol=0.02)
    with pytest.raises(UserError, match="0 finite labels"):
        PriorRidge().fit(X, np.full(10, np.nan))
    with pytest.raises(UserError, match="one finite label per row"):
        PriorRidge().fit(X, y[:3])


def test_one_label_and_constant_labels_predict_that_value() -> None:
    for count in (1, 5, 20):
        X = np.random.default_rng(7).normal(size=(count, 3))
        mean, std = PriorRidge().fit(X, np.full(count, 3.0)).predict(X)
        np.testing.assert_allclose(mean, 3.0)
        assert np.isfinite(std).all()


def test_without_tuning_a_fit_keeps_what_the_last_one_chose() -> None:
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (200, 4))
    y = np.exp(X[:, 0] + np.sin(6 * X[:, 1]))
    model = PriorRidge(groups=["a", "a", "b", "b"]).fit(X[:150], y[:150])
    tuned = PriorRidge(groups=["a", "a", "b", "b"]).fit(X, y)
    assert model._warp.log and model._rbf is not None
    kept = model._scale.copy()
    model.fit(X, y, tune=False)
    assert model._warp.log and model._rbf is not None and (model._scale == kept).all()
    probe = rng.uniform(-1, 1, (50, 4))
    expected = np.exp(probe[:, 0] + np.sin(6 * probe[:, 1]))
    best = rmse(tuned.predict_mean(probe), expected)
    assert rmse(model.predict_mean(probe), expected) < 1.3 * best


def test_the_log_is_taken_where_it_makes_the_target_linear() -> None:
    rng = np.random.default_rng(1)
    X = rng.uniform(-1, 1, (40, 3))
    z = X @ [1.0, -0.5, 0.3] + 0.01 * rng.normal(size=40)
    assert PriorRidge().fit(X, np.exp(z))._warp.log
    assert not PriorRidge().fit(X, 5 + z)._warp.log
    assert not PriorRidge().fit(X, z)._warp.log
