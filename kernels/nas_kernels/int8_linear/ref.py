"""Symmetric int8 quantisation and the integer matrix product, in plain PyTorch.

Weights have one scale per output row, activations one per token, so that a token's result never
depends on other tokens (a per-tensor activation scale would let a later token change an earlier
one, and prefill would differ from step-by-step decoding).

Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (vector-wise quantisation); Zafrir et al.
2019, "Q8BERT", section 2 (training on rounded weights and activations).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nas_kernels.rounding import TINY

INT8_MAX = 127.0


class QuantizedActivations(NamedTuple):
    """int8 rows and the scale of each: `values_MK * scale_M1` approximates the input."""

    values_MK: Tensor
    scale_M1: Tensor
    shape: torch.Size
    dtype: torch.dtype


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, K) and fp32 scales (N,) with one scale per output row."""
    scale_N = (weight_NK.detach().abs().amax(dim=1).clamp_min(TINY) / INT8_MAX).float()
    return torch.round(weight_NK.detach() / scale_N[:, None]).to(torch.int8), scale_N


def quantize_activations(x: Tensor) -> QuantizedActivations:
    """Quantise `x` (..., K) with one scale per row, of at least fp32."""
    x_MK = x.reshape(-1, x.shape[-1])
    peak_M1 = x_MK.abs().amax(dim=1, keepdim=True)
    if x.dtype in (torch.bfloat16, torch.float16):
        peak_M1 = peak_M1.float()
    scale_M1 = peak_M1.clamp_min_(TINY).mul_(1.0 / INT8_MAX)
    values_MK = torch.div(x_MK, scale_M1).round_().to(torch.int8)
    return QuantizedActivations(values_MK, scale_M1, x.shape, x.dtype)


def int8_linear_ref(x: QuantizedActivations, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N) from dequantised factors, in `x.dtype`."""
    x_MK = x.values_MK.to(x.scale_M1.dtype) * x.scale_M1
    weight = weight_NK.to(x_MK.dtype) * scale_N.to(x_MK.dtype)[:, None]
    return (x_MK @ weight.t()).to(x.dtype).view(*x.shape[:-1], len(weight_NK))


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
