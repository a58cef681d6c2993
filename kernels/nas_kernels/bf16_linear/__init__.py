"""Linear maps with bf16 weights, computed in bf16 where that is the faster way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.bf16_linear.ref import bf16_linear_ref, fake_round_bf16

__all__ = ["bf16_linear", "bf16_linear_ref", "fake_round_bf16", "fresh_bf16_rows"]

# Below both, one AVX-512/AMX core measured 10 us on upcast weights against 26 us in bf16 (192 x
# 192, 1 token: setting up the bf16 product costs more than the product); at 768 x 768 it is 188
# against 87 us.
SMALL_WEIGHT, FEW_TOKENS = 1 << 16, 16


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 matrix tiles (AMX); without, bf16 products lose to fp32 ones."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(tiles is not None and tiles())


def bf16_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return `x @ weight.T` (..., N) in the dtype of `x`.

    Computed with activations rounded to bf16 where the device multiplies bf16 fast, otherwise in
    the dtype of `x` from upcast weights. float64 input is always computed in float64.

    Args:
        x: (..., K), floating point.
        weight_NK: bf16, or anything that may be rounded to it (int8 is exact in bf16).
    """
    dtype = torch.bfloat16 if _pays(x, weight_NK) else x.dtype
    return F.linear(x.to(dtype), weight_NK.to(dtype)).to(x.dtype)


def fresh_bf16_rows(x: Tensor) -> Tensor:
    """Return `x` (..., K) as a contiguous bf16 copy (M, K): memory that kernels may rely on."""
    x_MK = x.reshape(-1, x.shape[-1])
    return x_MK.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)


def _pays(x: Tensor, weight_NK: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    if not x.is_cpu:
        return True
    few = x.numel() <= FEW_TOKENS * x.shape[-1]
    return _cpu_multiplies_bf16() and not (few and weight_NK.numel() <= SMALL_WEIGHT)
