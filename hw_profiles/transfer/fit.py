"""Fitting per-factor speed ratios through the sums that networks are.

A network's latency on the target is the sum over its sub-blocks of `source latency * exp(features
@ weights)`. Its logarithm is linearised around the present weights (Gauss-Newton), where a feature
of the network is the mean of its sub-blocks' features, weighted with their share of its latency.
With independent normal priors of the weights this is Gaussian process regression.

Letters: N measured networks, M networks, S sub-blocks and once more, P features.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.transfer.features import Features

Floats = NDArray[np.float64]

NOISE_SDS = (0.01, 0.02, 0.04, 0.08, 0.16)
FACTOR_SDS = (0.01, 0.03, 0.06, 0.12, 0.25)
SIZE_SDS = (0.01, 0.03, 0.1, 0.3)
"""Standard deviations, of relative errors and of logarithms of speed ratios, that are tried."""
USUAL_SDS = (0.02, 0.06, 0.1)
"""Medians of the log-normal hyperpriors of noise, factors and sizes; their log deviation is 1."""
STEPS = 4
"""Gauss-Newton steps; the model is so nearly linear that the third changes nothing to speak of."""
MIN_SHARE_OF_PARTS = 0.1
"""What is paid once may be below 0, but leaves a network this share of its sub-blocks' sum."""


@dataclass(frozen=True)
class TransferModel:
    """Latencies on the target as a function of weights.

    Args:
        source_us: of each sub-block on the source; 1 in the last place, for what is paid once.
        features: of each.
    """

    source_us: Floats
    features: Features

    def sub_block_us(self, weights_P: Floats) -> Floats:
        """Return the latency of each sub-block on the target, shape (S,)."""
        log_ratio_S = self.features.values_SP @ weights_P
        return np.asarray(self.source_us * np.exp(log_ratio_S))

    def linearised(self, amounts_MS: Floats, weights_P: Floats) -> tuple[Floats, Floats]:
        """Return the log latency of networks, shape (M,), and its gradient, shape (M, P).

        Args:
            amounts_MS: how often each has every sub-block; in the last place what it pays once on
                the source in microseconds.
            weights_P: where to linearise.
        """
        parts_MS = amounts_MS * self.sub_block_us(weights_P)
        once_M, blocks_M = parts_MS[:, -1], parts_MS[:, :-1].sum(axis=1)
        total_M = np.maximum(blocks_M + once_M, MIN_SHARE_OF_PARTS * blocks_M)
        return np.log(total_M), (parts_MS @ self.features.values_SP) / total_M[:, None]


@dataclass(frozen=True)
class TransferFit:
    """Weights and how far they can be trusted.

    Args:
        weights_P: posterior mean.
        covariance_PP: posterior covariance.
        left_out_log_errors: log of measured / predicted for each network, predicted from the
            others, shape (N,).
        left_out_sds: standard deviation that was expected of each of these, shape (N,).
        noise_sd: relative standard deviation of a network around the model.
        score: logarithm of the probability of the measurements, up to a constant.
    """

    weights_P: Floats
    covariance_PP: Floats
    left_out_log_errors: Floats
    left_out_sds: Floats
    noise_sd: float
    score: float

    def errors_expected(self, gradient_MP: Floats) -> Floats:
        """Return log errors, shape (N,), as they would be were networks with these gradients left
        out and not the measured ones: those were chosen for being unlike the others.
        """
        variance_M = self.relative_sd(gradient_MP) ** 2 + self.noise_sd**2
        usual_sd = math.sqrt(float(np.mean(variance_M)))
        return np.asarray(self.left_out_log_errors / self.left_out_sds * usual_sd)

    def relative_sd(self, gradient_MP: Floats) -> Floats:
        """Return the standard deviation of log latencies with these gradients, shape (M,)."""
        variance_M = np.sum((gradient_MP @ self.covariance_PP) * gradient_MP, axis=1)
        return np.asarray(np.sqrt(np.maximum(variance_M, 0.0)))


def fit_transfer(
    model: TransferModel, amounts_NS: Floats, measured_us: Floats, errors: Floats
) -> TransferFit:
    """Fit the weights to measured networks.

    The standard deviations of noise, factors and sizes are not chosen but averaged over, each
    combination with its posterior probability: with 10 networks several are as good, and the best
    one by chance is worse than their mean.

    Args:
        model: latencies as a function of weights.
        amounts_NS: the networks; see `TransferModel.linearised`.
        measured_us: their latencies on the target, shape (N,).
        errors: relative standard error of each as far as it is known, shape (N,); 0 otherwise.

    Source: Rasmussen & Williams 2006, "Gaussian Processes for Machine Learning", equation 2.42
    (explicit basis functions), section 5.2 with equations 5.5 to 5.8 (hyperparameters), and
    equations 5.10 to 5.12 (leave-one-out).
    """
    log_us = np.log(measured_us)
    fits = [
        _fit_with(model, amounts_NS, log_us, errors, sds)
        for sds in itertools.product(NOISE_SDS, FACTOR_SDS, SIZE_SDS)
    ]
    best = max(fit.score for fit in fits)
    shares = np.exp([fit.score - best for fit in fits])
    shares /= shares.sum()
    weights_P = np.einsum("f,fp->p", shares, [fit.weights_P for fit in fits])
    covariance_PP = np.zeros((len(weights_P), len(weights_P)))
    for share, fit in zip(shares, fits, strict=True):
        away_P = fit.weights_P - weights_P
        covariance_PP += share * (fit.covariance_PP + np.outer(away_P, away_P))
    return TransferFit(
        weights_P=weights_P,
        covariance_PP=covariance_PP,
        left_out_log_errors=shares @ np.array([fit.left_out_log_errors for fit in fits]),
        left_out_sds=np.sqrt(shares @ np.array([fit.left_out_sds**2 for fit in fits])),
        noise_sd=math.sqrt(shares @ np.array([fit.noise_sd**2 for fit in fits])),
        score=best,
    )


def _fit_with(
    model: TransferModel,
    amounts_NS: Floats,
    log_us: Floats,
    errors: Floats,
    sds: tuple[float, float, float],
) -> TransferFit:
    """Return the fit under given standard deviations of noise, factors and sizes."""
    variance_P = model.features.prior_variance(*sds[1:])
    noise_NN = np.diag(sds[0] ** 2 + errors**2)
    weights_P = np.zeros(len(variance_P))
    for _ in range(STEPS):
        predicted, gradient_NP = model.linearised(amounts_NS, weights_P)
        target = log_us - predicted + gradient_NP @ weights_P
        scaled_PN = (gradient_NP * variance_P).T
        kernel_NN = gradient_NP @ scaled_PN + noise_NN
        inverse_NN = np.linalg.inv(kernel_NN)
        gain_PN = scaled_PN @ inverse_NN
        weights_P = gain_PN @ target
    pulled = inverse_NN @ target
    usual = sum(math.log(sd / middle) ** 2 for sd, middle in zip(sds, USUAL_SDS, strict=True))
    score = target @ pulled + np.linalg.slogdet(kernel_NN).logabsdet + usual
    return TransferFit(
        weights_P=weights_P,
        covariance_PP=np.diag(variance_P) - gain_PN @ scaled_PN.T,
        left_out_log_errors=pulled / np.diag(inverse_NN),
        left_out_sds=1.0 / np.sqrt(np.diag(inverse_NN)),
        noise_sd=sds[0],
        score=float(-0.5 * score),
    )
