"""fp8 quantisation (e4m3fn: 4 bits of exponent, 3 of mantissa, no infinities) in plain PyTorch.

Weights have one scale per output row, activations one per token: the largest number of a row
becomes the largest of the format. As with int8, a token's result never depends on other tokens.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", sections 2 (scaling to the range
of the format) and 3 (E4M3 for weights and activations); Dettmers et al. 2022, "LLM.int8()",
section 2.1 (a scale per row and token).

Shapes: M tokens, N output rows, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nas_kernels.precision import without_autocast
from nas_kernels.rounding import TINY, straight_through

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Activations(NamedTuple):
    """fp8 rows and the scale of each: `values_MK * scale_M1` approximates the input."""

    values_MK: Tensor
    scale_M1: Tensor
    shape: torch.Size
    dtype: torch.dtype


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp8 values (N, K) and fp32 scales (N,); the scales as stored decide the values."""
    weight_NK = weight_NK.detach()
    scale_N = (weight_NK.abs().amax(dim=1).clamp_min(TINY) / FP8_MAX).float()
    return torch.div(weight_NK, scale_N[:, None]).to(FP8), scale_N


def quantize_activations(x: Tensor) -> Fp8Activations:
    """Quantise `x` (..., K) with one scale per row, of at least fp32."""
    values_MK, scale_M1 = _rounded_rows(x.reshape(-1, x.shape[-1]))
    return Fp8Activations(values_MK, scale_M1, x.shape, x.dtype)


def fp8_linear_ref(x: Fp8Activations, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N) in `x.dtype`.

    Dequantised values are multiplied in fp32 (in float64 if that was quantised), in which they and
    their products are exact: correct and slow.
    """
    values_MK = x.values_MK.to(x.scale_M1.dtype)
    with without_autocast(values_MK):  # fp16 cannot hold their sums
        out_MN = values_MK @ weight_NK.to(values_MK.dtype).t()
    out_MN = out_MN * x.scale_M1 * scale_N.to(out_MN.dtype)
    return out_MN.to(x.dtype).view(*x.shape[:-1], len(weight_NK))


def fake_quantize_weight(weight_NK: Tensor) -> Tensor:
    """Round to what `quantize_weight` stores; the gradient passes straight through."""
    values_NK, scale_N = quantize_weight(weight_NK)
    dtype = torch.promote_types(weight_NK.dtype, scale_N.dtype)
    rounded_NK = values_NK.to(dtype) * scale_N[:, None].to(dtype)
    return straight_through(weight_NK, rounded_NK.to(weight_NK.dtype))


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Round each row as `quantize_activations` does; the gradient passes straight through."""
    values, scale = _rounded_rows(x.detach())
    return straight_through(x, (values.to(scale.dtype) * scale).to(x.dtype))


def _rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` (..., K) in fp8, and scales (..., 1)."""
    peak = x.abs().amax(dim=-1, keepdim=True)
    peak = peak.to(torch.promote_types(x.dtype, torch.float32))
    scale = peak.clamp_min(TINY) * (1.0 / FP8_MAX)
    return torch.div(x, scale).to(FP8), scale
