"""Norms that remember batches, in the form that they have for the first one.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from searchspace.norms.unified_norm import UnifiedNorm
from searchspace.subnet import Subnet


def forget_batches(network: Subnet) -> None:
    """Replace every norm whose result depends on earlier passes, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, UnifiedNorm):
                setattr(module, name, FirstBatchNorm(child))


class FirstBatchNorm(nn.Module):
    """A `UnifiedNorm` in training while its window is empty: ``w x / sqrt(mean(x^2) + eps) + b``.

    The mean is over the batch's tokens. The gradient is the exact one, which can be differentiated
    again.
    """

    def __init__(self, norm: UnifiedNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape and dtype."""
        square_D = x_BTD.square().flatten(0, -2).mean(dim=0)
        out_BTD = torch.addcmul(self.bias, x_BTD * torch.rsqrt(square_D + self.eps), self.weight)
        return out_BTD
