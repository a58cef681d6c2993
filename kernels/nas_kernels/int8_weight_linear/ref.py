"""Weight-only int8 in plain PyTorch: symmetric, one bf16 scale per output row.

Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (row-wise absmax quantisation).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.rounding import TINY, straight_through

INT8_MAX = 127


def quantize_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, K) and bf16 scales (N,).

    The values are chosen for the scale as it is stored, so its rounding costs nothing but a
    slightly uneven use of the range.
    """
    weight_NK = weight_NK.detach()
    scale_N = (weight_NK.abs().amax(dim=1).clamp_min(TINY) / INT8_MAX).to(torch.bfloat16)
    values_NK = torch.round(weight_NK / scale_N[:, None].to(weight_NK.dtype))
    return values_NK.clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale_N


def dequantize_rows(values_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) that is stored."""
    return values_NK.to(dtype) * scale_N.to(dtype)[:, None]


def fake_quantize_rows(weight_NK: Tensor) -> Tensor:
    """Round to the grid; the gradient passes straight through."""
    rounded_NK = dequantize_rows(*quantize_rows(weight_NK), weight_NK.dtype)
    return straight_through(weight_NK, rounded_NK)


def int8_weight_linear_ref(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ (scale * weight).T` (..., N), computed in the dtype of `x`."""
    return F.linear(x, dequantize_rows(weight_NK, scale_N, x.dtype))
