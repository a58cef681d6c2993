"""Layer normalisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.dispatch import may_have_kernels
from nas_kernels.norms import layer_norm
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
        if may_have_kernels(x_BTD):
            return layer_norm(x_BTD, self.weight, self.bias, self.eps)
        return F.layer_norm(x_BTD, self.weight.shape, self.weight, self.bias, self.eps)


class LayerNormE12(LayerNorm):
    """Layer norm with 1e-12 under the root, as BERT has it."""

    eps = 1e-12
