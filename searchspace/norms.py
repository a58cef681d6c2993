"""Normalisation operators over the last axis."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the features, then scale and shift.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.
    """

    axes: ClassVar = {"weight": ("d_model",), "bias": ("d_model",)}
    eps = 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape."""
        return F.layer_norm(x_BTD, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Unit root mean square over the features, then scale.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    axes: ClassVar = {"weight": ("d_model",)}
    eps = 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape."""
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
"""Every normalisation by name."""
