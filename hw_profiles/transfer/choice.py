"""Choosing the networks whose latencies tell most about all the others'.

Letters: M networks to choose from, P features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOISE_SD = 0.02
"""Relative standard deviation that a measurement is assumed to have."""


def most_informative(
    gradients_MP: Sequence[Floats], variances_P: Sequence[Floats], num: int
) -> list[int]:
    """Return the networks whose measurement leaves the least mean variance over all, best first.

    They are chosen one after the other, each as if it were the last. Workloads count alike.

    Args:
        gradients_MP: of the log latency of every network that could be measured, by workload.
        variances_P: prior variances of the weights, by workload.
        num: how many to choose; all where there are no more.

    Source: Cohn 1994, "Neural Network Exploration Using Optimal Experiment Design", section 3
    (expected variance over the input distribution), for a linear model.
    """
    noise = NOISE_SD**2
    covariances_MM = [
        (gradient_MP * variance_P) @ gradient_MP.T
        for gradient_MP, variance_P in zip(gradients_MP, variances_P, strict=True)
    ]
    chosen: list[int] = []
    for _ in range(min(num, len(covariances_MM[0]))):
        gain_M = np.zeros(len(covariances_MM[0]))
        for covariance_MM in covariances_MM:
            gain_M += (covariance_MM**2).sum(axis=0) / (noise + np.diag(covariance_MM))
        gain_M[chosen] = -np.inf
        best = int(np.argmax(gain_M))
        chosen.append(best)
        for covariance_MM in covariances_MM:
            column_M = covariance_MM[:, best].copy()
            covariance_MM -= np.outer(column_M, column_M) / (noise + column_M[best])
    return chosen
