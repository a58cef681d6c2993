"""Root mean square normalisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.dispatch import may_have_kernels
from nas_kernels.norms import rms_norm
from searchspace.norms.base import Norm


class RMSNorm(Norm):
    """Unit root mean square over the features, then scale.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    axes: ClassVar = {"weight": ("d_model",)}
    eps = 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape."""
        if may_have_kernels(x_BTD):
            return rms_norm(x_BTD, self.weight, self.eps)
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


class RMSNormE6(RMSNorm):
    """RMS norm with 1e-6 under the root, as Llama 1, Qwen2 and Qwen3 have it."""

    eps = 1e-6
