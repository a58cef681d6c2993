"""Quantising activations in one pass over memory, and the int8 product.

Inference only: nothing here has a gradient.

Shapes: M tokens, N output rows, K columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on
from nas_kernels.int8_linear.ref import INT8_MAX, QuantizedActivations
from nas_kernels.packed_linear.triton_kernel import packed_linear
from nas_kernels.rounding import TINY
from nas_kernels.strides import any_rows

WIDEST = 8192
"""Columns that a program keeps in registers; longer rows are read twice."""


@triton.jit
def _round_half_even(x):
    """Round as `torch.round`: written out, as Triton has no such function of its own."""
    below = tl.floor(x)
    rest = x - below
    odd = below - 2.0 * tl.floor(below * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1.0))
    return tl.where(up, below + 1.0, below)


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scale_ptr, K, stride_xm, stride_xk, tiny, inverse, WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_row, values_row = x_ptr + row * stride_xm, values_ptr + row * K
    if WHOLE:
        at = columns.to(tl.int64) * stride_xk
        x = tl.load(x_row + at, mask=columns < K, other=0).to(tl.float32)
        largest, broken = tl.abs(x), (x != x).to(tl.int32)
    else:
        largest = tl.zeros((BLOCK_K,), tl.float32)
        broken = tl.zeros((BLOCK_K,), tl.int32)
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
    if WHOLE:
        values = _round_half_even(tl.div_rn(x, divisor)).to(tl.int8)
        tl.store(values_row + columns, values, mask=columns < K)
    else:
        for start in range(0, K, BLOCK_K):
            k = start + columns
            x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(tl.float32)
            values = _round_half_even(tl.div_rn(x, divisor)).to(tl.int8)
            tl.store(values_row + k, values, mask=k < K)


class Blocks(NamedTuple):
    """Columns that a program has at a time, and its warps."""

    columns: int
    warps: int


def quantize_activations(x: Tensor, in_features: int) -> QuantizedActivations:
    """Return what the reference returns for `x[..., :in_features]`; values are bit for bit equal.

    Args:
        x: (..., at least K), floating point of at most 32 bits.
        in_features: K, at least 1.
    """
    x_MK, shape = any_rows(x), torch.Size((*x.shape[:-1], in_features))
    block = min(triton.next_power_of_2(in_features), WIDEST)
    blocks = Blocks(block, 4 if block <= 2048 else 8)
    with launching_on(x):
        if tuning.wanted() and len(x_MK):
            key = tuning.rounded(len(x_MK), in_features, x.dtype)
            candidates = [blocks, *(Blocks(block, warps) for warps in (4, 8, 16))]
            if in_features > 4096:
                candidates += [Blocks(4096, 8), Blocks(4096, 4)]
            run = partial(_quantize, x_MK, in_features)
            blocks = tuning.choose("quantize_activations", key, candidates, run)
        values_MK, scale_M1 = _quantize(x_MK, in_features, blocks)
    return QuantizedActivations(values_MK, scale_M1, shape, x.dtype)


def _quantize(x_MK: Tensor, in_features: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    tokens = len(x_MK)
    values_MK = torch.empty(tokens, in_features, dtype=torch.int8, device=x_MK.device)
    scale_M1 = torch.empty(tokens, 1, dtype=torch.float32, device=x_MK.device)
    if tokens:
        _quantize_kernel[(tokens,)](
            x_MK, values_MK, scale_M1, in_features, *x_MK.stride(), TINY, 1.0 / INT8_MAX,
            WHOLE=in_features <= blocks.columns, BLOCK_K=blocks.columns, num_warps=blocks.warps,
        )  # fmt: skip
    return values_MK, scale_M1


def int8_linear(
    x: QuantizedActivations, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N), in the dtype that was quantised."""
    out_MN = packed_linear(
        x.values_MK, weight_NK, scale_N, x.scale_M1[:, 0], bias_N, codes=1, dtype=x.dtype
    )
    return out_MN.view(*x.shape[:-1], weight_NK.shape[0])
