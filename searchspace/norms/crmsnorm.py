"""Root mean square normalisation of vectors that leave out their last feature.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from searchspace.norms.base import Norm, in_full_precision


class CRMSNorm(Norm):
    """Root mean square normalisation of a compressed vector, then scale.

    The D features are those of a vector with D + 1 features and zero mean: the last one is minus
    the sum of the others, and counts in the mean square though it is never stored.

    Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", section on
    Pre-CRMSNorm.
    """

    axes: ClassVar = {"weight": ("d_model",)}
    eps = 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape."""
        full = in_full_precision(x_BTD)
        squares_BT1 = full.square().sum(-1, keepdim=True) + full.sum(-1, keepdim=True).square()
        inverse_BT1 = torch.rsqrt(squares_BT1 / (x_BTD.shape[-1] + 1) + self.eps)
        return (full * inverse_BT1 * self.weight).to(x_BTD.dtype)
