"""The definition, in float64 or in fp32.

Shapes: D features of a row; D' >= D of a weight that serves wider rows too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.precision import at_least_fp32


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last axis; see `nas_kernels.norms`."""
    full = at_least_fp32(x)
    scale = torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + eps)
    return (full * scale * weight[: x.shape[-1]]).to(x.dtype)


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis."""
    full = at_least_fp32(x)
    centred = full - full.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    out = centred * scale * weight[: x.shape[-1]]
    return (out if bias is None else out + bias[: x.shape[-1]]).to(x.dtype)
