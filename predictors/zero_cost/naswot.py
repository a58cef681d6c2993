"""How differently the network sees different tokens, by the signs of its hidden units.

Shapes: N tokens, F hidden units.
"""

from __future__ import annotations

import torch

from predictors.zero_cost.probe import Probe


def naswot(probe: Probe) -> float:
    """Return ``log |det(K + I)|`` with ``K = sum over FFNs of x x^T + (1 - x)(1 - x)^T``.

    The rows of x are up to 128 tokens spread over the batch, its columns the FFN's hidden units,
    its entries 1 where the activation (of a gated FFN: the product) is positive. So K counts the
    units on which two tokens agree. I is ours: it keeps the determinant of tokens that no unit
    tells apart (equal tokens without a mixer) from vanishing, and gives exactly 0 to a network
    without any FFN, the least possible value.

    Source: Mellor et al. 2021, "Neural Architecture Search without Training", equations 1-2.
    """
    patterns = probe.loss_pass.patterns
    if not patterns:
        return 0.0
    # Counts up to a few thousand are exact in float32, and it halves the products' time.
    agreeing_NN = sum((_agreement(p) for p in patterns), start=torch.zeros(()))
    return float(torch.linalg.slogdet(agreeing_NN.double() + torch.eye(len(patterns[0]))).logabsdet)


def _agreement(positive_NF: torch.Tensor) -> torch.Tensor:
    # x x^T + (1-x)(1-x)^T = (F + s s^T) / 2 for the signs s = 2x - 1.
    signs = positive_NF.float() * 2 - 1
    return (signs @ signs.T + signs.shape[1]) / 2
