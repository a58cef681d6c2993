"""Normalisation of rows, each read once and written once.

A program holds whole rows. Backward, a program goes through several tiles of rows and sums its part
of the gradients of weight and bias; the parts are then added in a fixed order, so that the result
is the same every time.

Shapes: R rows, D features of a row, P programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on, num_multiprocessors
from nas_kernels.norms.blocks import Blocks, backward_blocks, forward_blocks, padded_width
from nas_kernels.strides import as_rows


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, scale_ptr,
    x_stride, residual_stride, num_rows, width, eps,
    CENTRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    in_row = cols < width
    there = (rows < num_rows)[:, None] & in_row[None, :]
    written = rows[:, None] * width + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=there, other=0.0)
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        where = rows[:, None] * residual_stride + cols[None, :]
        x += tl.load(residual_ptr + where, mask=there, other=0.0).to(tl.float32)
        # What is normalised is what is stored: the same as adding first, and as backward sees it.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + written, rounded, mask=there)
        x = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / width
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        x = tl.where(there, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    y = x * scale[:, None]
    y *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + written, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, mean_ptr, scale_ptr, dy_ptr, dsum_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    x_stride, dy_stride, dsum_stride, num_rows, width, num_tiles,
    CENTRED: tl.constexpr, HAS_DSUM: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    in_row = cols < width
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(0, num_tiles):
        rows = (program * num_tiles + tile) * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        there = is_row[:, None] & in_row[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=there, other=0.0)
        x = x.to(tl.float32)
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
            x = tl.where(there, x - mean[:, None], 0.0)
        scale = tl.load(scale_ptr + rows, mask=is_row, other=0.0)
        x *= scale[:, None]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=there, other=0.0)
        dy = dy.to(tl.float32)
        if NEEDS_WEIGHT:
            dweight += tl.sum(dy * x, axis=0)
        if NEEDS_BIAS:
            dbias += tl.sum(dy, axis=0)
        dy *= weight[None, :]
        dx = dy - x * (tl.sum(dy * x, axis=1) / width)[:, None]
        if CENTRED:
            dx -= (tl.sum(dy, axis=1) / width)[:, None]
        dx *= scale[:, None]
        if HAS_DSUM:
            where = rows[:, None] * dsum_stride + cols[None, :]
            dx += tl.load(dsum_ptr + where, mask=there, other=0.0).to(tl.float32)
        written = rows[:, None] * width + cols[None, :]
        tl.store(dx_ptr + written, dx.to(dx_ptr.dtype.element_ty), mask=there)
    if NEEDS_WEIGHT:
        tl.store(dweight_ptr + program * width + cols, dweight, mask=in_row)
    if NEEDS_BIAS:
        tl.store(dbias_ptr + program * width + cols, dbias, mask=in_row)


class Normalise(torch.autograd.Function):
    """The sum of two inputs, where there are two, and its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight_D: Tensor,
        bias_D: Tensor | None,
        eps: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the norm, and the sum where there is a residual."""
        x_RD, residual_RD = as_rows(x), None if residual is None else as_rows(residual)
        weight_D = weight_D.contiguous()
        bias_D = None if bias_D is None else bias_D.contiguous()
        candidates = forward_blocks(padded_width(x_RD.shape[1]))
        blocks, given = candidates[0], (x_RD, residual_RD, weight_D, bias_D, eps, centred)
        with launching_on(x):
            if tuning.wanted():
                key = tuning.rounded(*x_RD.shape, residual is not None, centred, x.dtype)
                blocks = tuning.choose("norms", key, candidates, partial(_forward, *given))
            y_RD, total_RD, mean_R, scale_R = _forward(*given, blocks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total_RD, weight_D, mean_R, scale_R)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if residual is None else residual.dtype)
        ctx.bias_dtype = None if bias_D is None else bias_D.dtype
        y = y_RD.view(x.shape)
        return y, None if residual is None else total_RD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> Any:
        """Return the gradients of the inputs that need one."""
        dx, dweight_D, dbias_D = dsum, None, None
        if dy is not None:
            dx, dweight_D, dbias_D = _gradients(ctx, dy, dsum)
        x_dtype, residual_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad
        return (
            dx.to(x_dtype) if dx is not None and wanted[0] else None,
            dx.to(residual_dtype) if dx is not None and wanted[1] else None,
            dweight_D,
            dbias_D,
            None,
            None,
        )


def _forward(
    x_RD: Tensor,
    residual_RD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    centred: bool,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the norm, what it is of, and its rows' means and factors."""
    (num_rows, width), total_RD, stride = x_RD.shape, x_RD, 0
    if residual_RD is not None:
        dtype = torch.promote_types(x_RD.dtype, residual_RD.dtype)
        total_RD = torch.empty(num_rows, width, dtype=dtype, device=x_RD.device)
        stride = residual_RD.stride(0)
    y_RD = torch.empty(num_rows, width, dtype=total_RD.dtype, device=x_RD.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=x_RD.device)
    mean_R = torch.empty_like(scale_R) if centred else None
    _forward_kernel[(triton.cdiv(num_rows, blocks.rows),)](
        x_RD, residual_RD, weight_D, bias_D, total_RD, y_RD, mean_R, scale_R,
        x_RD.stride(0), stride, num_rows, width, eps,
        CENTRED=centred, HAS_RESIDUAL=residual_RD is not None, HAS_BIAS=bias_D is not None,
        ROWS=blocks.rows, BLOCK=padded_width(width), num_warps=blocks.warps,
    )  # fmt: skip
    return y_RD, total_RD, mean_R, scale_R


def _gradients(
    ctx: Any, dy: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the normalised input, of the weight and of the bias."""
    x_RD, weight_D, mean_R, scale_R = ctx.saved_tensors
    dy_RD, dsum_RD = as_rows(dy), None if dsum is None else as_rows(dsum)
    of_weight, of_bias = ctx.needs_input_grad[2:4]
    candidates = backward_blocks(padded_width(x_RD.shape[1]))
    blocks = candidates[0]
    given = (x_RD, weight_D, mean_R, scale_R, dy_RD, dsum_RD, of_weight, of_bias)
    with launching_on(x_RD):
        if tuning.wanted():
            key = tuning.rounded(*x_RD.shape, dsum is not None, of_weight, of_bias, x_RD.dtype)
            run = partial(_backward, *given)
            blocks = tuning.choose("norms backward", key, candidates, run)
        dx_RD, dweight_PD, dbias_PD = _backward(*given, blocks)
    dweight_D = None if dweight_PD is None else dweight_PD.sum(dim=0).to(weight_D.dtype)
    dbias_D = None if dbias_PD is None else dbias_PD.sum(dim=0).to(ctx.bias_dtype)
    return dx_RD.view(ctx.shape), dweight_D, dbias_D


def _backward(
    x_RD: Tensor,
    weight_D: Tensor,
    mean_R: Tensor | None,
    scale_R: Tensor,
    dy_RD: Tensor,
    dsum_RD: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
    blocks: Blocks,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of the normalised input, and programs' parts of the others."""
    num_rows, width = x_RD.shape
    most_programs = num_multiprocessors(x_RD.device) * blocks.programs
    num_tiles = triton.cdiv(num_rows, blocks.rows * most_programs)
    num_programs = triton.cdiv(num_rows, blocks.rows * num_tiles)
    dx_RD = torch.empty(num_rows, width, dtype=x_RD.dtype, device=x_RD.device)
    options: dict[str, Any] = {"dtype": torch.float32, "device": x_RD.device}
    dweight_PD = torch.empty(num_programs, width, **options) if needs_weight else None
    dbias_PD = torch.empty(num_programs, width, **options) if needs_bias else None
    _backward_kernel[(num_programs,)](
        x_RD, weight_D, mean_R, scale_R, dy_RD, dsum_RD, dx_RD, dweight_PD, dbias_PD,
        x_RD.stride(0), dy_RD.stride(0), 0 if dsum_RD is None else dsum_RD.stride(0),
        num_rows, width, num_tiles,
        CENTRED=mean_R is not None, HAS_DSUM=dsum_RD is not None, NEEDS_WEIGHT=needs_weight,
        NEEDS_BIAS=needs_bias, ROWS=blocks.rows, BLOCK=padded_width(width),
        num_warps=blocks.warps,
    )  # fmt: skip
    return dx_RD, dweight_PD, dbias_PD
