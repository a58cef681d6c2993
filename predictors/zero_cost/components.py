"""How many principal components hold a share of the variance.

Shapes: N rows, F columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-10
"""Share of the mean square below which a variance is no more than rounding."""


def num_components(rows_NF: Tensor, share: float) -> float:
    """Return how many principal components hold `share` of the variance of rows, as a fraction.

    The cumulative share is taken as linear between whole numbers, so that rounding cannot make the
    number jump; rounded up it is the usual one. 0 where nothing varies.
    """
    size = float(rows_NF.norm())
    centred_NF = rows_NF - rows_NF.mean(dim=0, dtype=torch.float64).to(rows_NF.dtype)
    deviation = float(centred_NF.norm())
    if deviation**2 <= ROUNDING * size**2:
        return 0.0
    # Shares need the products in no more than single precision, the eigenvalues in double.
    centred_NF = centred_NF / deviation
    wide = centred_NF.shape[1] > centred_NF.shape[0]
    gram = centred_NF @ centred_NF.T if wide else centred_NF.T @ centred_NF
    shares = torch.linalg.eigvalsh(gram.double()).clamp_min(0.0).flip(0)
    cumulative = shares.cumsum(0) / shares.sum()
    whole = int((cumulative < share).sum())
    before = float(cumulative[whole - 1]) if whole else 0.0
    return whole + (share - before) / (float(cumulative[whole]) - before)
