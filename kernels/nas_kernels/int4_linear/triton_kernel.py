"""Group-wise int4 weights times floating activations, unpacked in registers.

Rows, and columns up to any number, may be leading slices of a larger packed weight: nothing is
copied. Inference only: nothing here has a gradient.

Shapes: M tokens, N output rows, K columns, P = ceil(K / 2) bytes of a row, G = ceil(K / 32) groups.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.dispatch import interpreting, launching_on
from nas_kernels.int4_linear.ref import GROUP, Int4Weight
from nas_kernels.int4_linear.tiles import int4_tiles
from nas_kernels.launching import Tiles
from nas_kernels.split_k.triton_kernel import (
    check_vector,
    num_splits,
    row_stride,
    scale_and_store,
    sum_splits,
)
from nas_kernels.strides import any_rows

COLUMNS: tl.constexpr = tl.constexpr(GROUP)
BYTES: tl.constexpr = tl.constexpr(GROUP // 2)


@triton.jit
def _grids(scale_ptr, zero_ptr, n, g, N, G, stride_sn, stride_sg, stride_zn, stride_zg):
    """Return scale and value of code 0 of rows and groups (len(n), len(g)), in fp32."""
    mask = (n < N)[:, None] & (g < G)[None, :]
    rows, groups = n.to(tl.int64)[:, None], g.to(tl.int64)[None, :]
    scale = tl.load(scale_ptr + rows * stride_sn + groups * stride_sg, mask=mask, other=0)
    zero = tl.load(zero_ptr + rows * stride_zn + groups * stride_zg, mask=mask, other=0)
    scale = scale.to(tl.float32)
    return scale, zero.to(tl.float32) - 8.0 * scale


@triton.jit
def _vector_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, zero_ptr, bias_ptr, N, K, P, G, stride_xk, stride_wn,
    stride_wp, stride_sn, stride_sg, stride_zn, stride_zg, stride_bias, steps_each,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One token: codes are multiplied as they are, and scaled once for each group.

    `sum_k x_k (c_k s + o) = s sum_k x_k c_k + o sum_k x_k` within a group.
    """
    n, split = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    w_rows = w_ptr + n.to(tl.int64)[:, None, None] * stride_wn
    last = tl.minimum((split + 1) * steps_each, tl.cdiv(G, BLOCK_G))
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for step in range(split * steps_each, last):
        g = step * BLOCK_G + tl.arange(0, BLOCK_G)
        p = g[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        k = g[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (n < N)[:, None, None] & (p < P)[None, :, :]
        byte = tl.load(w_rows + p.to(tl.int64)[None, :, :] * stride_wp, mask=mask, other=0)
        x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_G, BYTES, 2)))
        products = (byte & 15).to(tl.float32) * even[None, :, :]
        products += (byte >> 4).to(tl.float32) * odd[None, :, :]
        scale, lowest = _grids(
            scale_ptr, zero_ptr, n, g, N, G, stride_sn, stride_sg, stride_zn, stride_zg
        )
        acc += scale * tl.sum(products, axis=2) + lowest * tl.sum(x, axis=1)[None, :]
    scale_and_store(
        tl.sum(acc, axis=1)[None, :], tl.arange(0, 1), n, split, out_ptr, None, None, bias_ptr, 1,
        N, 0, 0, stride_bias, RAW=SPLITS > 1, HAS_SCALE_M=False, HAS_SCALE_N=False,
        HAS_BIAS=HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _tile_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, zero_ptr, bias_ptr, M, N, K, P, G, stride_xm, stride_xk,
    stride_wn, stride_wp, stride_sn, stride_sg, stride_zn, stride_zg, stride_bias, steps_each,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Several tokens: a tile of the weight is dequantised to their dtype and multiplied."""
    BLOCK_G: tl.constexpr = BLOCK_K // COLUMNS
    BLOCK_P: tl.constexpr = BLOCK_K // 2
    blocks_m = tl.cdiv(M, BLOCK_M)
    block, split = tl.program_id(0), tl.program_id(1)
    m = (block % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + n.to(tl.int64)[:, None] * stride_wn
    last = tl.minimum((split + 1) * steps_each, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps_each, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        g = step * BLOCK_G + tl.arange(0, BLOCK_G)
        x_mask, w_mask = (m < M)[:, None] & (k < K)[None, :], (n < N)[:, None] & (p < P)[None, :]
        x = tl.load(x_rows + k.to(tl.int64)[None, :] * stride_xk, mask=x_mask, other=0)
        byte = tl.load(w_rows + p.to(tl.int64)[None, :] * stride_wp, mask=w_mask, other=0)
        scale, lowest = _grids(
            scale_ptr, zero_ptr, n, g, N, G, stride_sn, stride_sg, stride_zn, stride_zg
        )
        codes = tl.join(byte & 15, byte >> 4)
        codes = tl.reshape(codes, (BLOCK_N, BLOCK_G, COLUMNS)).to(tl.float32)
        weight = tl.reshape(codes * scale[:, :, None] + lowest[:, :, None], (BLOCK_N, BLOCK_K))
        if INTERPRETED:
            acc = tl.dot(x.to(tl.float32), tl.trans(weight), acc)
        else:
            acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="tf32")
    scale_and_store(
        acc, m, n, split, out_ptr, None, None, bias_ptr, M, N, 0, 0, stride_bias, RAW=SPLITS > 1,
        HAS_SCALE_M=False, HAS_SCALE_N=False, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip


def int4_linear(
    x: Tensor, weight: Int4Weight, bias_N: Tensor | None, splits: int | None = None
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N) in the dtype of `x`, with fp32 sums.

    Args:
        x: (..., K), floating point of at most 32 bits; fp32 is multiplied as TF32.
        weight: bytes (N, >= ceil(K/2)) and grids (N, >= ceil(K/32)), with any strides.
        bias_N: added to the result.
        splits: parts of K that are summed apart; chosen from the shapes by default.

    Raises:
        ValueError: when shapes do not fit.
    """
    x_MK = any_rows(x)
    (tokens, columns), rows = x_MK.shape, weight.packed_NP.shape[0]
    _check(weight, columns)
    check_vector("bias_N", bias_N, (rows,))
    if tokens * rows == 0:
        return torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    candidates = int4_tiles(tokens, x.dtype)
    tiles, given = candidates[0], (x_MK, weight, bias_N, splits)
    with launching_on(x):
        if tuning.wanted():
            key = tuning.rounded(tokens, rows, columns, x.dtype)
            tiles = tuning.choose("int4_linear", key, candidates, partial(_launch, *given))
        out_MN = _launch(*given, tiles)
    return out_MN.view(*x.shape[:-1], rows)


def _launch(
    x_MK: Tensor, weight: Int4Weight, bias_N: Tensor | None, splits: int | None, tiles: Tiles
) -> Tensor:
    (tokens, columns), rows = x_MK.shape, weight.packed_NP.shape[0]
    blocks = triton.cdiv(tokens, tiles.block_m) * triton.cdiv(rows, tiles.block_n)
    steps = triton.cdiv(columns, tiles.block_k)
    splits = num_splits(blocks, steps, tiles.waves, x_MK.device) if splits is None else splits
    target = out_MN = torch.empty(tokens, rows, dtype=x_MK.dtype, device=x_MK.device)
    if splits > 1:
        target = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x_MK.device)
    pointers = (x_MK, weight.packed_NP, target, weight.scale_NG, weight.zero_NG, bias_N)
    sizes = (rows, columns, triton.cdiv(columns, 2), triton.cdiv(columns, GROUP))
    strides = (*weight.packed_NP.stride(), *weight.scale_NG.stride(), *weight.zero_NG.stride())
    tail = (*strides, row_stride(bias_N), triton.cdiv(steps, splits))
    flags = {
        "SPLITS": splits,
        "HAS_BIAS": bias_N is not None,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.warps,
    }
    if tokens == 1:
        _vector_kernel[(blocks, splits)](
            *pointers, *sizes, x_MK.stride(1), *tail, **flags, BLOCK_G=tiles.block_k // GROUP
        )
    else:
        _tile_kernel[(blocks, splits)](
            *pointers, tokens, *sizes, *x_MK.stride(), *tail, **flags,
            INTERPRETED=interpreting(), BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k,
            num_stages=tiles.stages,
        )  # fmt: skip
    if splits > 1:
        sum_splits(target, out_MN, None, None, bias_N)
    return out_MN


def _check(weight: Int4Weight, columns: int) -> None:
    rows, stored = weight.packed_NP.shape
    groups = triton.cdiv(columns, GROUP)
    for grid in (weight.scale_NG, weight.zero_NG):
        if len(grid) != rows or grid.shape[1] < groups or 2 * stored < columns:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in weight)
            raise ValueError(f"an int4 weight of shapes {shapes} is not for {columns} columns")
