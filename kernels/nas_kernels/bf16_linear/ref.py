"""bf16 weights in plain PyTorch.

Source: Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.rounding import straight_through


def bf16_linear_ref(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N), computed in the dtype of `x`."""
    return F.linear(x, weight_NK.to(x.dtype))


def fake_round_bf16(weight_NK: Tensor) -> Tensor:
    """Round to bf16 and back; the gradient passes straight through."""
    return straight_through(weight_NK, weight_NK.detach().to(torch.bfloat16).to(weight_NK.dtype))
