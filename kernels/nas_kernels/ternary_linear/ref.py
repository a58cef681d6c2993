"""Ternary weights in plain PyTorch.

Source: Ma et al. 2024, "The Era of 1-bit LLMs", section 2 (absmean: `RoundClip(W / mean|W|, -1, 1)`
and int8 activations per token); Nielsen et al. 2024, "When are 1.58 bits enough?", section 3.

Shapes: N output rows, K columns, Q = ceil(K / 4) bytes per row, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.int8_linear import QuantizedActivations, int8_linear_ref
from nas_kernels.rounding import TINY, straight_through

CODES_PER_BYTE = 4


def quantize_ternary(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (N, K) in -1, 0, 1 and the fp32 scale (1,), the mean of `|weight|`."""
    weight_NK = weight_NK.detach()
    scale_1 = weight_NK.abs().mean().clamp_min(TINY).float().reshape(1)
    codes_NK = torch.round(weight_NK / scale_1.to(weight_NK.dtype)).clamp_(-1, 1)
    return codes_NK.to(torch.int8), scale_1


def pack_ternary(codes_NK: Tensor) -> Tensor:
    """Store four codes to a byte as `code + 1`, the first column lowest; (N, ceil(K/4)) uint8."""
    rows, columns = codes_NK.shape
    shifted = F.pad((codes_NK + 1).to(torch.uint8), (0, -columns % CODES_PER_BYTE))
    first, second, third, fourth = shifted.view(rows, -1, CODES_PER_BYTE).unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_ternary(packed_NQ: Tensor, in_features: int) -> Tensor:
    """Undo `pack_ternary`; returns contiguous int8 codes (N, K)."""
    parts = [(packed_NQ >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :in_features].contiguous()


def fake_quantize_ternary(weight_NK: Tensor) -> Tensor:
    """Round to the three values; the gradient passes straight through."""
    codes_NK, scale_1 = quantize_ternary(weight_NK)
    rounded_NK = codes_NK.to(weight_NK.dtype) * scale_1.to(weight_NK.dtype)
    return straight_through(weight_NK, rounded_NK)


def ternary_linear_ref(x: QuantizedActivations, packed_NQ: Tensor, scale_1: Tensor) -> Tensor:
    """Return `x @ weight.T` (..., N) from dequantised factors."""
    return int8_linear_ref(x, unpack_ternary(packed_NQ, x.shape[-1]), scale_1)
