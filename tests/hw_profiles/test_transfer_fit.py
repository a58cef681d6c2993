"""The fit of a transfer on a model small enough to be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hw_profiles.transfer.choice import NOISE_SD, most_informative
from hw_profiles.transfer.features import Features
from hw_profiles.transfer.fit import TransferModel, _fit_with, fit_transfer


def test_networks_are_chosen_by_the_variance_they_leave() -> None:
    rng = np.random.default_rng(0)
    gradients, variances = (
        [rng.normal(size=(9, 4)) for _ in range(2)],
        [np.array([9, 1, 1, 0.1])] * 2,
    )

    def left(rows: Sequence[int]) -> float:
        total = 0.0
        for gradient_MP, variance_P in zip(gradients, variances, strict=True):
            seen_NP = gradient_MP[list(rows)]
            precision_PP = np.diag(1 / variance_P) + seen_NP.T @ seen_NP / NOISE_SD**2
            total += float(np.trace(gradient_MP @ np.linalg.inv(precision_PP) @ gradient_MP.T))
        return total

    chosen = most_informative(gradients, variances, 5)
    for step in range(5):
        rest = [row for row in range(9) if row not in chosen[:step]]
        assert min(rest, key=lambda row: left([*chosen[:step], row])) == chosen[step]
    assert sorted(most_informative(gradients, variances, 99)) == list(range(9))


def small_model(rng: np.random.Generator) -> TransferModel:
    features = Features(rng.normal(size=(7, 3)), np.array([0, 1, 2]), ("a", "b", "c"))
    return TransferModel(rng.uniform(50, 100, size=7), features)


def test_gradient_of_a_network_is_right() -> None:
    rng = np.random.default_rng(1)
    model = small_model(rng)
    amounts_NS, weights_P = rng.uniform(0, 3, size=(5, 7)), rng.normal(0, 0.1, size=3)
    _, gradient_NP = model.linearised(amounts_NS, weights_P)
    for column in range(3):
        step = 1e-6
        moved = np.where(np.arange(3) == column, step, 0.0)
        above, below = (model.linearised(amounts_NS, weights_P + s * moved)[0] for s in (1, -1))
        np.testing.assert_allclose((above - below) / (2 * step), gradient_NP[:, column], rtol=1e-6)


def test_fit_finds_weights_through_sums() -> None:
    rng = np.random.default_rng(2)
    model, weights_P = small_model(rng), np.array([0.7, 0.1, -0.2])
    amounts_NS = rng.integers(0, 4, size=(12, 7)).astype(float)
    measured_us = amounts_NS @ model.sub_block_us(weights_P)
    fit = fit_transfer(model, amounts_NS, measured_us, np.zeros(12))
    np.testing.assert_allclose(fit.weights_P, weights_P, atol=0.03)


def test_left_out_errors_are_those_of_fits_without_a_network() -> None:
    rng = np.random.default_rng(3)
    model, sds = small_model(rng), (0.02, 0.06, 0.1)
    amounts_NS = rng.integers(0, 4, size=(8, 7)).astype(float)
    noise_N = np.exp(rng.normal(0.0, 0.02, size=8))
    log_us = np.log(amounts_NS @ model.sub_block_us(np.array([0.7, 0.1, -0.2])) * noise_N)
    fit = _fit_with(model, amounts_NS, log_us, np.zeros(8), sds)
    for row in range(8):
        rest = np.arange(8) != row
        without = _fit_with(model, amounts_NS[rest], log_us[rest], np.zeros(7), sds)
        guess, gradient_1P = model.linearised(amounts_NS[[row]], without.weights_P)
        error = float(log_us[row] - guess[0])
        assert fit.left_out_log_errors[row] == pytest.approx(error, abs=1e-3)
        variance = float(without.relative_sd(gradient_1P)[0]) ** 2 + sds[0] ** 2
        assert fit.left_out_sds[row] == pytest.approx(variance**0.5, rel=0.05)
