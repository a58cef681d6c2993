"""`out = scale_M * scale_N * (x @ codes.T) + bias` from int8 or 2-bit codes, without a copy.

Weights and inputs are read through their strides, so leading rows and columns of a maximal weight
need no copy. Integer activations are multiplied and summed as integers, exactly; floating ones in
their own dtype with fp32 sums (fp32 ones as TF32).

Shapes: M tokens, N output rows, K columns, P stored bytes of a row, S parts of K (split-K).
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
from nas_kernels.launching import Tiles
from nas_kernels.packed_linear.tiles import packed_tiles
from nas_kernels.split_k.triton_kernel import (
    check_vector,
    num_splits,
    row_stride,
    scale_and_store,
    sum_splits,
)


@triton.jit
def _codes_of(byte, part: tl.constexpr, CODES: tl.constexpr):
    """Return the int8 code number `part` of each stored byte."""
    if CODES == 1:
        return byte
    else:
        return ((byte >> (2 * part)) & 3).to(tl.int8) - 1


@triton.jit
def _all_codes(byte, CODES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the codes (BLOCK_N, BLOCK_K) of bytes (BLOCK_N, BLOCK_K / CODES), in order."""
    if CODES == 1:
        return byte
    else:
        even = tl.join(_codes_of(byte, 0, CODES), _codes_of(byte, 2, CODES))
        odd = tl.join(_codes_of(byte, 1, CODES), _codes_of(byte, 3, CODES))
        return tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_K))


@triton.jit
def _tile_kernel(
    x_ptr, w_ptr, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr, M, N, K, P, stride_xm, stride_xk,
    stride_wn, stride_wp, stride_sm, stride_sn, stride_bias, steps_each, CODES: tl.constexpr,
    INTEGER: tl.constexpr, SPLITS: tl.constexpr, HAS_SCALE_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_P: tl.constexpr = BLOCK_K // CODES
    blocks_m = tl.cdiv(M, BLOCK_M)
    block, split = tl.program_id(0), tl.program_id(1)
    m = (block % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + n.to(tl.int64)[:, None] * stride_wn
    last = tl.minimum((split + 1) * steps_each, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for step in range(split * steps_each, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        x_mask = (m < M)[:, None] & (k < K)[None, :]
        w_mask = (n < N)[:, None] & (p < P)[None, :]
        x = tl.load(x_rows + k.to(tl.int64)[None, :] * stride_xk, mask=x_mask, other=0)
        byte = tl.load(w_rows + p.to(tl.int64)[None, :] * stride_wp, mask=w_mask, other=0)
        codes = _all_codes(byte, CODES, BLOCK_N, BLOCK_K)
        if INTEGER:
            acc = tl.dot(x, tl.trans(codes), acc, out_dtype=tl.int32)
        elif INTERPRETED:
            acc = tl.dot(x.to(tl.float32), tl.trans(codes).to(tl.float32), acc)
        else:
            acc = tl.dot(x, tl.trans(codes).to(x.dtype), acc, input_precision="tf32")
    scale_and_store(
        acc, m, n, split, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr, M, N, stride_sm, stride_sn,
        stride_bias, RAW=SPLITS > 1, HAS_SCALE_M=HAS_SCALE_M, HAS_SCALE_N=True, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _vector_kernel(
    x_ptr, w_ptr, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr, N, K, P, stride_xk, stride_wn,
    stride_wp, stride_sn, stride_bias, steps_each, CODES: tl.constexpr, INTEGER: tl.constexpr,
    SPLITS: tl.constexpr, HAS_SCALE_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token: every weight is used once, so products are summed where they were unpacked."""
    dtype: tl.constexpr = tl.int32 if INTEGER else tl.float32
    n, split = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    w_rows = w_ptr + n.to(tl.int64)[:, None] * stride_wn
    last = tl.minimum((split + 1) * steps_each, tl.cdiv(K, BLOCK_P * CODES))
    acc = tl.zeros((BLOCK_N, BLOCK_P), dtype)
    for step in range(split * steps_each, last):
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        w_mask = (n < N)[:, None] & (p < P)[None, :]
        byte = tl.load(w_rows + p.to(tl.int64)[None, :] * stride_wp, mask=w_mask, other=0)
        k = p[:, None] * CODES + tl.arange(0, CODES)[None, :]
        x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(dtype)
        if CODES == 1:
            acc += byte.to(dtype) * tl.reshape(x, (BLOCK_P,))[None, :]
        else:
            even, odd = tl.split(tl.reshape(x, (BLOCK_P, 2, 2)))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            acc += _codes_of(byte, 0, CODES).to(dtype) * first[None, :]
            acc += _codes_of(byte, 1, CODES).to(dtype) * second[None, :]
            acc += _codes_of(byte, 2, CODES).to(dtype) * third[None, :]
            acc += _codes_of(byte, 3, CODES).to(dtype) * fourth[None, :]
    scale_and_store(
        tl.sum(acc, axis=1)[None, :], tl.arange(0, 1), n, split, out_ptr, scale_m_ptr,
        scale_n_ptr, bias_ptr, 1, N, 0, stride_sn, stride_bias, RAW=SPLITS > 1,
        HAS_SCALE_M=HAS_SCALE_M, HAS_SCALE_N=True, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip


def packed_linear(
    x_MK: Tensor,
    packed_NP: Tensor,
    scale_N: Tensor,
    scale_M: Tensor | None,
    bias_N: Tensor | None,
    codes: int,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Tensor:
    """Return `scale_M * scale_N * (x @ unpacked.T) + bias` of shape (M, N).

    Args:
        x_MK: int8, or floating point of at most 32 bits; any strides.
        packed_NP: int8 (N, K) for one code to a byte, uint8 (N, >= ceil(K/4)) for four; any
            strides, so leading rows and columns of a larger weight.
        scale_N: of each row, or one for all, of shape (1,).
        scale_M: of each token.
        bias_N: added to the result.
        codes: in a byte, 1 or 4.
        dtype: of the result.
        splits: parts of K that are summed apart; chosen from the shapes by default.

    Raises:
        ValueError: when shapes do not fit.
    """
    (tokens, columns), rows = x_MK.shape, packed_NP.shape[0]
    stored = triton.cdiv(columns, codes)
    if packed_NP.shape[1] < stored or (codes == 1 and packed_NP.shape[1] > columns):
        raise ValueError(
            f"a weight of {packed_NP.shape[1]} bytes a row is not for {columns} columns"
        )
    check_vector("scale_N", scale_N, (rows, 1))
    check_vector("bias_N", bias_N, (rows,))
    if tokens * rows == 0:
        return torch.empty(tokens, rows, dtype=dtype, device=x_MK.device)
    candidates = packed_tiles(tokens, codes, x_MK.dtype)
    tiles, given = candidates[0], (x_MK, packed_NP, scale_N, scale_M, bias_N, codes, dtype, splits)
    with launching_on(x_MK):
        if tuning.wanted():
            key = tuning.rounded(tokens, rows, columns, codes, x_MK.dtype)
            run = partial(_launch, *given)
            tiles = tuning.choose("packed_linear", key, candidates, run)
        return _launch(*given, tiles)


def _launch(
    x_MK: Tensor,
    packed_NP: Tensor,
    scale_N: Tensor,
    scale_M: Tensor | None,
    bias_N: Tensor | None,
    codes: int,
    dtype: torch.dtype,
    splits: int | None,
    tiles: Tiles,
) -> Tensor:
    (tokens, columns), rows = x_MK.shape, packed_NP.shape[0]
    blocks = triton.cdiv(tokens, tiles.block_m) * triton.cdiv(rows, tiles.block_n)
    steps = triton.cdiv(columns, tiles.block_k)
    splits = num_splits(blocks, steps, tiles.waves, x_MK.device) if splits is None else splits
    integer = not x_MK.is_floating_point()
    target = out_MN = torch.empty(tokens, rows, dtype=dtype, device=x_MK.device)
    if splits > 1:
        acc_dtype = torch.int32 if integer else torch.float32
        target = torch.empty(splits, tokens, rows, dtype=acc_dtype, device=x_MK.device)
    pointers = (x_MK, packed_NP, target, scale_M, scale_N, bias_N)
    flags = {
        "CODES": codes,
        "INTEGER": integer,
        "SPLITS": splits,
        "HAS_SCALE_M": scale_M is not None,
        "HAS_BIAS": bias_N is not None,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.warps,
    }
    sizes = (rows, columns, triton.cdiv(columns, codes))
    tail = (row_stride(scale_N), row_stride(bias_N), triton.cdiv(steps, splits))
    if tokens == 1:
        _vector_kernel[(blocks, splits)](
            *pointers, *sizes, x_MK.stride(1), *packed_NP.stride(), *tail,
            **flags, BLOCK_P=tiles.block_k // codes,
        )  # fmt: skip
    else:
        _tile_kernel[(blocks, splits)](
            *pointers, tokens, *sizes, *x_MK.stride(), *packed_NP.stride(),
            row_stride(scale_M), *tail, **flags, INTERPRETED=interpreting(),
            BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, num_stages=tiles.stages,
        )  # fmt: skip
    if splits > 1:
        sum_splits(target, out_MN, scale_M, scale_N, bias_N)
    return out_MN
