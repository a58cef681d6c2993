"""A linear map by the leading part of a larger weight, its activation and its gate, in one launch.

Tiles of the result are computed one a program; several networks that share the weight are rows of
the grid. Products are accumulated in fp32 and activated there; what backward needs of them, the
projections before the activation, is stored in the dtype of the result.

Shapes: M rows, n outputs, k inputs; tiles of BM x BN, BK inputs at a time; G networks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

X, X_STRIDE, Y, UP, GATE, ROWS, OUT, IN, COLUMNS = (tl.constexpr(i) for i in range(9))
"""Columns of the table that describes every network of a group; addresses are relative."""


@triton.jit
def tile_position(tile, tiles_down, tiles_across):
    """Return where a tile lies: bands of eight rows are gone through column by column.

    Programs that run at the same time then share both operands in the cache.
    """
    band = tile // (8 * tiles_across)
    height = tl.minimum(tiles_down - band * 8, 8)
    within = tile % (8 * tiles_across)
    return band * 8 + within % height, within // height


@triton.jit
def gelu_gate(z):
    """Return the factor s of `gelu(z) = z s` (tanh form), and its derivative.

    `(1 + tanh(u)) / 2 = sigmoid(2 u)`. Beyond 10 the factor is 0 or 1 in fp32, and its polynomial
    would overflow.
    """
    inner = tl.minimum(tl.maximum(z, -10.0), 10.0)
    square = inner * inner
    s = tl.sigmoid(1.5957691216057308 * inner * (1.0 + 0.044715 * square))
    return s, s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return the activation of `z`; NaN stays NaN."""
    if ACTIVATION == "gelu":
        s, _ = gelu_gate(z)
        z = z * s
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu2":
        z = tl.where(z < 0.0, 0.0, z)
        z = z * z
    return z


@triton.jit
def _forward_tile(
    tile, x_ptr, weight_ptr, gate_weight_ptr, bias_ptr, gate_bias_ptr, y_ptr, up_ptr, gate_ptr,
    num_rows, num_out, num_in, x_stride, weight_stride, gate_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    down, across = tile_position(tile, tl.cdiv(num_rows, BM), tl.cdiv(num_out, BN))
    rows = down.to(tl.int64) * BM + tl.arange(0, BM)
    cols = across.to(tl.int64) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    is_row, is_col = rows < num_rows, cols < num_out
    x_ptrs = x_ptr + rows[:, None] * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + cols[None, :] * weight_stride + inner[:, None]
    up = tl.zeros((BM, BN), dtype=tl.float32)
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    if GATED:
        gate_ptrs = gate_weight_ptr + cols[None, :] * gate_stride + inner[:, None]
    for start in range(0, num_in, BK):
        x_mask, weight_mask = is_row[:, None], is_col[None, :]
        if not EVEN:
            is_inner = inner < num_in - start
            x_mask, weight_mask = x_mask & is_inner[None, :], weight_mask & is_inner[:, None]
        x = tl.load(x_ptrs + start, mask=x_mask, other=0.0).to(COMPUTE)
        weight = tl.load(weight_ptrs + start, mask=weight_mask, other=0.0).to(COMPUTE)
        up = tl.dot(x, weight, acc=up, input_precision=PRECISION)
        if GATED:
            weight = tl.load(gate_ptrs + start, mask=weight_mask, other=0.0).to(COMPUTE)
            gate = tl.dot(x, weight, acc=gate, input_precision=PRECISION)
    if HAS_BIAS:
        up += tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    mask = is_row[:, None] & is_col[None, :]
    written = rows[:, None] * num_out + cols[None, :]
    if KEEP:
        tl.store(up_ptr + written, up.to(up_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(gate_ptr + written, gate.to(gate_ptr.dtype.element_ty), mask=mask)
    y = activate(gate, ACTIVATION) * up if GATED else activate(up, ACTIVATION)
    tl.store(y_ptr + written, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, gate_weight_ptr, bias_ptr, gate_bias_ptr, y_ptr, up_ptr, gate_ptr,
    num_rows, num_out, num_in, x_stride, weight_stride, gate_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one network; grid: (tiles,)."""
    _forward_tile(
        tl.program_id(0), x_ptr, weight_ptr, gate_weight_ptr, bias_ptr, gate_bias_ptr, y_ptr,
        up_ptr, gate_ptr, num_rows, num_out, num_in, x_stride, weight_stride, gate_stride,
        ACTIVATION, GATED, KEEP, HAS_BIAS, HAS_GATE_BIAS, EVEN, COMPUTE, PRECISION, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def grouped_forward_kernel(
    table_ptr, x_ptr, weight_ptr, gate_weight_ptr, bias_ptr, gate_bias_ptr, y_ptr, up_ptr,
    gate_ptr, weight_stride, gate_stride,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, EVEN: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute several networks; grid: (most tiles of one, G).

    Pointers that a network has no use for are given all the same: they are moved, never read.
    """
    entry = table_ptr + tl.program_id(1) * COLUMNS
    num_rows = tl.load(entry + ROWS)
    num_out = tl.multiple_of(tl.load(entry + OUT), ALIGN)
    num_in = tl.multiple_of(tl.load(entry + IN), ALIGN)
    tile = tl.program_id(0)
    x_ptr += tl.multiple_of(tl.load(entry + X), ALIGN)
    x_stride = tl.multiple_of(tl.load(entry + X_STRIDE), ALIGN)
    y_ptr += tl.multiple_of(tl.load(entry + Y), ALIGN)
    up_ptr += tl.multiple_of(tl.load(entry + UP), ALIGN)
    gate_ptr += tl.multiple_of(tl.load(entry + GATE), ALIGN)
    if tile < tl.cdiv(num_rows, BM) * tl.cdiv(num_out, BN):
        _forward_tile(
            tile, x_ptr, weight_ptr, gate_weight_ptr, bias_ptr, gate_bias_ptr, y_ptr, up_ptr,
            gate_ptr, num_rows, num_out, num_in, x_stride, weight_stride, gate_stride,
            ACTIVATION, GATED, KEEP, HAS_BIAS, HAS_GATE_BIAS, EVEN, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
