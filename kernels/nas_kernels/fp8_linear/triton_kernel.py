"""Quantising activations to fp8 in one launch; PyTorch's operators would take six.

Inference only: nothing here has a gradient.

Shapes: M tokens, K columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels.dispatch import launching_on
from nas_kernels.fp8_linear.ref import FP8, FP8_MAX, Fp8Activations
from nas_kernels.rounding import TINY
from nas_kernels.strides import any_rows

WIDEST = 8192
"""Columns that a program processes at a time."""
HIGHEST_BITS: tl.constexpr = tl.constexpr(0x7F800000)
"""The exponent of an fp32 number."""
SMALLEST_STEP: tl.constexpr = tl.constexpr(2.0**-9)
"""Of the numbers below 2^-6, which have the same distance from each other."""
WHOLE_STEPS: tl.constexpr = tl.constexpr(1.5 * 2**23)
"""An fp32 number of so many steps has no parts of one: adding it rounds, half to even."""


@triton.jit
def _on_grid(x):
    """Round fp32 numbers to e4m3; what is left to converting them is exact.

    Converting does not round everywhere: Triton's interpreter cuts bits off.
    """
    power = (x.to(tl.int32, bitcast=True) & HIGHEST_BITS).to(tl.float32, bitcast=True)
    large = tl.maximum(power * 0.125, SMALLEST_STEP) * WHOLE_STEPS
    return (x + large) - large


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scale_ptr, K, stride_xm, stride_xk, tiny, inverse, BLOCK_K: tl.constexpr
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    x_row, values_row = x_ptr + row * stride_xm, values_ptr + row * K
    largest, broken = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        broken += (x != x).to(tl.int32)
    scale = tl.maximum(tl.max(largest, axis=0), tiny) * inverse
    # A maximum may drop NaN; a row with one must not come out as numbers.
    scale = tl.where(tl.sum(broken, axis=0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    divisor = tl.broadcast_to(scale, (BLOCK_K,))
    for start in range(0, K, BLOCK_K):
        k = start + columns
        x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(tl.float32)
        values = _on_grid(tl.div_rn(x, divisor)).to(tl.float8e4nv)
        tl.store(values_row + k, values, mask=k < K)


def quantize_activations(x: Tensor) -> Fp8Activations:
    """Return what the reference returns; values are bit for bit equal, but in rows with NaN.

    There the scale is NaN, and values may be anything.

    Args:
        x: (..., K), floating point of at most 32 bits, at least one column.
    """
    x_MK = any_rows(x)
    tokens, columns = x_MK.shape
    values_MK = torch.empty(tokens, columns, dtype=FP8, device=x.device)
    scale_M1 = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        block = min(triton.next_power_of_2(columns), WIDEST)
        with launching_on(x):
            _quantize_kernel[(tokens,)](
                x_MK, values_MK, scale_M1, columns, *x_MK.stride(), TINY, 1.0 / FP8_MAX,
                BLOCK_K=block, num_warps=4 if block <= 2048 else 8,
            )  # fmt: skip
    return Fp8Activations(values_MK, scale_M1, x.shape, x.dtype)
