"""Splitting the sum over K between programs, and what ends a product: scales, bias, the cast.

Few tokens make few tiles. Several programs then sum parts of K each, and a second kernel adds the
parts in a fixed order: unlike with atomic additions, results do not change from run to run.

Shapes: M tokens, N output rows, S parts of K.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels.dispatch import num_multiprocessors
from nas_kernels.launching import power_of_two_below

MOST_SPLITS = 16
ROWS = 256


@triton.jit
def scale_and_store(
    acc, m, n, split, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr, M, N, stride_sm, stride_sn,
    stride_bias, RAW: tl.constexpr, HAS_SCALE_M: tl.constexpr, HAS_SCALE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store sums (len(m), len(n)): RAW ones in part `split` of (S, M, N), else scaled in (M, N)."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if RAW:
        tl.store(out_ptr + split.to(tl.int64) * M * N + at, acc, mask=mask)
    else:
        out = acc.to(tl.float32)
        if HAS_SCALE_M:
            scale_m = tl.load(scale_m_ptr + m.to(tl.int64) * stride_sm, mask=m < M, other=0)
            out *= scale_m.to(tl.float32)[:, None]
        if HAS_SCALE_N:
            scale_n = tl.load(scale_n_ptr + n.to(tl.int64) * stride_sn, mask=n < N, other=0)
            out *= scale_n.to(tl.float32)[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n.to(tl.int64) * stride_bias, mask=n < N, other=0)
            out += bias.to(tl.float32)[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr, M, N, stride_sm, stride_sn,
    stride_bias, SPLITS: tl.constexpr, HAS_SCALE_M: tl.constexpr, HAS_SCALE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), parts_ptr.dtype.element_ty)
    for split in range(SPLITS):
        at = (row.to(tl.int64) + split * M) * N + n
        acc += tl.load(parts_ptr + at, mask=n < N, other=0)
    scale_and_store(
        acc[None, :], row + tl.arange(0, 1), n, row, out_ptr, scale_m_ptr, scale_n_ptr, bias_ptr,
        M, N, stride_sm, stride_sn, stride_bias, RAW=False, HAS_SCALE_M=HAS_SCALE_M,
        HAS_SCALE_N=HAS_SCALE_N, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip


def sum_splits(
    parts_SMN: Tensor,
    out_MN: Tensor,
    scale_M: Tensor | None,
    scale_N: Tensor | None,
    bias_N: Tensor | None,
) -> None:
    """Write `scale_M * scale_N * sum of the parts + bias` to a contiguous `out_MN`."""
    splits, tokens, rows = parts_SMN.shape
    _sum_kernel[(tokens, triton.cdiv(rows, ROWS))](
        parts_SMN, out_MN, scale_M, scale_N, bias_N, tokens, rows, row_stride(scale_M),
        row_stride(scale_N), row_stride(bias_N), SPLITS=splits, HAS_SCALE_M=scale_M is not None,
        HAS_SCALE_N=scale_N is not None, HAS_BIAS=bias_N is not None, BLOCK_N=ROWS,
    )  # fmt: skip


def row_stride(values: Tensor | None) -> int:
    """Return the stride of a vector; one value stands for all, and so does None."""
    return 0 if values is None or len(values) == 1 else values.stride(0)


def check_vector(name: str, values: Tensor | None, sizes: tuple[int, ...]) -> None:
    """Raise a ValueError when a scale or bias is not of one of the sizes."""
    if values is not None and tuple(values.shape) not in {(size,) for size in sizes}:
        allowed = " or ".join(f"({size},)" for size in sizes)
        raise ValueError(f"{name} has the shape {tuple(values.shape)}, but {allowed} is needed")


def num_splits(blocks: int, steps: int, waves: int, device: torch.device) -> int:
    """Return into how many parts of at least two steps K is cut to occupy the device."""
    wanted = waves * num_multiprocessors(device) // max(blocks, 1)
    return power_of_two_below(min(wanted, steps // 2, MOST_SPLITS))
