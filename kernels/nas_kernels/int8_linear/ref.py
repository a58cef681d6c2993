"""Symmetric int8 quantisation and the integer matrix product, in plain PyTorch.

Weights have one scale per output row, activations one per token, so that a token's result never
depends on other tokens (a per-tensor activation scale would let a later token change an earlier
one, and prefill would differ from step-by-step decoding).

`torch._int_mm` was measured to beat the deprecated quantised-tensor operators of PyTorch once the
activations of several projections are quantised together, needs no packed copy, and is exact.

Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (vector-wise quantisation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INT8_MAX = 127.0
# Keeps the scale of an all-zero row finite; far below any scale that occurs.
TINY = 1e-12


class QuantizedActivations(NamedTuple):
    """int8 rows and the fp32 scale of each: `values_MK * scale_M1` approximates the input."""

    values_MK: Tensor
    scale_M1: Tensor
    shape: torch.Size


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, K) and fp32 scales (N,) with one scale per output row."""
    scale_N = weight_NK.detach().abs().amax(dim=1).clamp_min(TINY) / INT8_MAX
    return torch.round(weight_NK / scale_N[:, None]).to(torch.int8), scale_N


def quantize_activations(x: Tensor) -> QuantizedActivations:
    """Quantise `x` (..., K) with one scale per row."""
    x_MK = x.reshape(-1, x.shape[-1])
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).clamp_min_(TINY).mul_(1.0 / INT8_MAX)
    values_MK = torch.div(x_MK, scale_M1).round_().to(torch.int8)
    return QuantizedActivations(values_MK, scale_M1, x.shape)


def int8_linear(x: QuantizedActivations, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N) in fp32.

    Args:
        x: the quantised input of shape (..., K).
        weight_NK: int8 values; strided views are fine.
        scale_N: fp32 scale of each output row.
    """
    acc_MN = torch._int_mm(x.values_MK, weight_NK.t())
    return torch.mul(acc_MN, x.scale_M1).mul_(scale_N).view(*x.shape[:-1], -1)


def fake_quantize_weight(weight_NK: Tensor) -> Tensor:
    """Round to the int8 grid in fp32; the gradient passes straight through (STE)."""
    with torch.no_grad():
        scale_N1 = weight_NK.abs().amax(dim=1, keepdim=True).clamp_min_(TINY).div_(INT8_MAX)
        error_NK = torch.round(weight_NK / scale_N1).mul_(scale_N1).sub_(weight_NK)
    return weight_NK + error_NK


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Round each row to its int8 grid; the gradient passes straight through (STE)."""
    with torch.no_grad():
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY).mul_(1.0 / INT8_MAX)
        error = torch.round(x / scale).mul_(scale).sub_(x)
    return x + error
