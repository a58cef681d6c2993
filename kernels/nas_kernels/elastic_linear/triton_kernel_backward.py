"""Gradients of the fused linear map: of its activation, its inputs and its weights.

The gradient of a weight is that of the whole maximal weight: tiles that no network reaches are
written as zeros by the same launch. Networks of a group are added up in their order, in registers.

Shapes: M rows, n outputs, k inputs of a network, N x K of the maximal weight; tiles of BM x BN or
BN x BK; G networks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.elastic_linear.triton_kernel import (
    COLUMNS,
    GATE,
    IN,
    OUT,
    ROWS,
    UP,
    X_STRIDE,
    X,
    gelu_gate,
    tile_position,
)


@triton.jit
def activation_and_slope(z, ACTIVATION: tl.constexpr):
    """Return the activation of `z` and its derivative."""
    value, slope = z, z * 0.0 + 1.0
    if ACTIVATION == "gelu":
        s, ds = gelu_gate(z)
        value, slope = z * s, s + z * ds
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        value, slope = z * s, s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "relu":
        value, slope = tl.where(z < 0.0, 0.0, z), tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(z < 0.0, 0.0, z)
        value, slope = positive * positive, 2.0 * positive
    return value, slope


@triton.jit
def activation_gradient_kernel(
    dy_ptr, up_ptr, gate_ptr, dup_ptr, dgate_ptr, count,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of the result into those of the projections; all contiguous."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    dy = tl.load(dy_ptr + where, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + where, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + where, mask=mask, other=0.0).to(tl.float32)
        value, slope = activation_and_slope(gate, ACTIVATION)
        dgate = dy * up * slope
        tl.store(dgate_ptr + where, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        dup = dy * value
    else:
        value, slope = activation_and_slope(up, ACTIVATION)
        dup = dy * slope
    tl.store(dup_ptr + where, dup.to(dup_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_input_gradient(
    dx, rows, cols, d_ptr, weight_ptr, num_rows, num_out, num_in, weight_stride,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add `d W` to a tile, BK outputs at a time."""
    is_row, is_col = (rows < num_rows)[:, None], (cols < num_in)[None, :]
    for start in range(0, num_out, BK):
        inner = start + tl.arange(0, BK).to(tl.int64)
        is_inner = inner < num_out
        d_ptrs = d_ptr + rows[:, None] * num_out + inner[None, :]
        weight_ptrs = weight_ptr + inner[:, None] * weight_stride + cols[None, :]
        d = tl.load(d_ptrs, mask=is_row & is_inner[None, :], other=0.0).to(COMPUTE)
        weight = tl.load(weight_ptrs, mask=is_inner[:, None] & is_col, other=0.0).to(COMPUTE)
        dx = tl.dot(d, weight, acc=dx, input_precision=PRECISION)
    return dx


@triton.jit
def _input_tile(
    tile, dup_ptr, dgate_ptr, weight_ptr, gate_weight_ptr, dx_ptr, num_rows, num_out, num_in,
    weight_stride, gate_stride, GATED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of BM x BN of `dx = dup W + dgate W_gate`.

    One product after the other: both at once would take twice the shared memory.
    """
    down, across = tile_position(tile, tl.cdiv(num_rows, BM), tl.cdiv(num_in, BN))
    rows = down.to(tl.int64) * BM + tl.arange(0, BM)
    cols = across.to(tl.int64) * BN + tl.arange(0, BN)
    dx = tl.zeros((BM, BN), dtype=tl.float32)
    dx = _add_input_gradient(
        dx, rows, cols, dup_ptr, weight_ptr, num_rows, num_out, num_in, weight_stride,
        COMPUTE, PRECISION, BK,
    )  # fmt: skip
    if GATED:
        dx = _add_input_gradient(
            dx, rows, cols, dgate_ptr, gate_weight_ptr, num_rows, num_out, num_in, gate_stride,
            COMPUTE, PRECISION, BK,
        )  # fmt: skip
    written = rows[:, None] * num_in + cols[None, :]
    mask = (rows < num_rows)[:, None] & (cols < num_in)[None, :]
    tl.store(dx_ptr + written, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_kernel(
    dup_ptr, dgate_ptr, weight_ptr, gate_weight_ptr, dx_ptr, num_rows, num_out, num_in,
    weight_stride, gate_stride, GATED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute dx of one network; grid: (tiles,)."""
    _input_tile(
        tl.program_id(0), dup_ptr, dgate_ptr, weight_ptr, gate_weight_ptr, dx_ptr, num_rows,
        num_out, num_in, weight_stride, gate_stride, GATED, COMPUTE, PRECISION, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def grouped_input_gradient_kernel(
    table_ptr, dup_ptr, dgate_ptr, weight_ptr, gate_weight_ptr, dx_ptr, weight_stride,
    gate_stride, ALIGN: tl.constexpr, GATED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute dx of several networks; grid: (most tiles of one, G). X addresses dx here."""
    entry = table_ptr + tl.program_id(1) * COLUMNS
    num_rows = tl.load(entry + ROWS)
    num_out = tl.multiple_of(tl.load(entry + OUT), ALIGN)
    num_in = tl.multiple_of(tl.load(entry + IN), ALIGN)
    tile = tl.program_id(0)
    dup_ptr += tl.multiple_of(tl.load(entry + UP), ALIGN)
    dgate_ptr += tl.multiple_of(tl.load(entry + GATE), ALIGN)
    dx_ptr += tl.multiple_of(tl.load(entry + X), ALIGN)
    if tile < tl.cdiv(num_rows, BM) * tl.cdiv(num_in, BN):
        _input_tile(
            tile, dup_ptr, dgate_ptr, weight_ptr, gate_weight_ptr, dx_ptr, num_rows, num_out,
            num_in, weight_stride, gate_stride, GATED, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _add_weight_gradient(
    dweight, dgate_weight, first_out, first_in, dup_ptr, dgate_ptr, x_ptr, num_rows, num_out,
    num_in, x_stride, SPLITS: tl.constexpr, GATED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add `dup^T x` to a tile of BN outputs x BK inputs, over this program's part of the rows."""
    outs, ins = first_out + tl.arange(0, BN), first_in + tl.arange(0, BK)
    is_out, is_in = (outs < num_out)[:, None], (ins < num_in)[None, :]
    part = tl.cdiv(tl.cdiv(num_rows, BM), SPLITS) * BM
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, num_rows)
    # No rows at all where this network does not reach.
    last = tl.where((first_out < num_out) & (first_in < num_in), last, first)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        is_row = rows < num_rows
        read = rows[None, :] * num_out + outs[:, None]
        x_mask, read_mask = is_row[:, None] & is_in, is_out & is_row[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + ins[None, :], mask=x_mask, other=0.0)
        x = x.to(COMPUTE)
        d = tl.load(dup_ptr + read, mask=read_mask, other=0.0).to(COMPUTE)
        dweight = tl.dot(d, x, acc=dweight, input_precision=PRECISION)
        if GATED:
            d = tl.load(dgate_ptr + read, mask=read_mask, other=0.0).to(COMPUTE)
            dgate_weight = tl.dot(d, x, acc=dgate_weight, input_precision=PRECISION)
    return dweight, dgate_weight


@triton.jit
def weight_gradient_kernel(
    table_ptr, dup_ptr, dgate_ptr, x_ptr, dweight_ptr, dgate_weight_ptr, num_rows, num_out,
    num_in, x_stride, most_out, most_in,
    GROUPS: tl.constexpr, SPLITS: tl.constexpr, ALIGN: tl.constexpr, GATED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the maximal weights, N x K; grid: (tiles, SPLITS).

    Every split of the rows has a result of its own, one after the other, still to be added.
    With GROUPS = 0 there is one network, which the arguments describe; else there is a table.
    """
    down, across = tile_position(tl.program_id(0), tl.cdiv(most_out, BN), tl.cdiv(most_in, BK))
    first_out, first_in = down.to(tl.int64) * BN, across.to(tl.int64) * BK
    dweight = tl.zeros((BN, BK), dtype=tl.float32)
    dgate_weight = tl.zeros((BN, BK), dtype=tl.float32)
    if GROUPS == 0:
        dweight, dgate_weight = _add_weight_gradient(
            dweight, dgate_weight, first_out, first_in, dup_ptr, dgate_ptr, x_ptr, num_rows,
            num_out, num_in, x_stride, SPLITS, GATED, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
    else:
        for group in range(0, GROUPS):
            entry = table_ptr + group * COLUMNS
            dweight, dgate_weight = _add_weight_gradient(
                dweight, dgate_weight, first_out, first_in,
                dup_ptr + tl.multiple_of(tl.load(entry + UP), ALIGN),
                dgate_ptr + tl.multiple_of(tl.load(entry + GATE), ALIGN),
                x_ptr + tl.multiple_of(tl.load(entry + X), ALIGN),
                tl.load(entry + ROWS), tl.multiple_of(tl.load(entry + OUT), ALIGN),
                tl.multiple_of(tl.load(entry + IN), ALIGN),
                tl.multiple_of(tl.load(entry + X_STRIDE), ALIGN),
                SPLITS, GATED, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
    outs, ins = first_out + tl.arange(0, BN), first_in + tl.arange(0, BK)
    rows = tl.program_id(1).to(tl.int64) * most_out + outs
    written = rows[:, None] * most_in + ins[None, :]
    mask = (outs < most_out)[:, None] & (ins < most_in)[None, :]
    tl.store(dweight_ptr + written, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if GATED:
        dgate_weight = dgate_weight.to(dgate_weight_ptr.dtype.element_ty)
        tl.store(dgate_weight_ptr + written, dgate_weight, mask=mask)
