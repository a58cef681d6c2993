"""Layer normalisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.norms.base import Norm


class LayerNorm(Norm):
    """Zero mean and unit variance over the features, then scale and shift.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.
    """

    axes: ClassVar = {"weight": ("d_model",), "bias": ("d_model",)}
    eps = 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape."""
        return F.layer_norm(x_BTD, self.weight.shape, self.weight, self.bias, self.eps)
