"""How little the network's responses to different sequences point the same way."""

from __future__ import annotations

import numpy as np

from predictors.zero_cost.jacob_cov import jacobian_rows
from predictors.zero_cost.probe import Probe

EXPONENT = 1 / 20


def jacobian_cosine(probe: Probe) -> float:
    """Return ``1 - sum over i != j of |cos(J_i, J_j)|^(1/20) / (2 (N^2 - N))`` for N sequences.

    The rows of J are those of `jacob_cov`.

    Source: Celotti et al. 2020, "Improving Neural Architecture Search by Mixing a FireFly algorithm
    with a Training Free Evaluation"; constants as in Serianni and Kalita 2023, "Training-free
    Neural Architecture Search for RNNs and Transformers".

    Raises:
        UserError: as `jacob_cov`.
    """
    rows = jacobian_rows(probe)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = np.abs(rows @ rows.T)
    np.fill_diagonal(cosines, 0.0)
    pairs = len(rows) * (len(rows) - 1)
    return float(1.0 - (cosines**EXPONENT).sum() / (2 * pairs))
