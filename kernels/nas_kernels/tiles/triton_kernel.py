"""Loading and storing matrices by tiles, and the operator of a recurrence.

Rows and columns are numbers from the first one of a matrix, in 32 bits; addresses are computed in
64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """Load a matrix as it is stored, zeros outside."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(base + at, mask=mask, other=0.0)


@triton.jit
def load_fp32_tile(base, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """Load a matrix in fp32, zeros outside."""
    x = load_tile(base, rows, columns, row_stride, column_stride, num_rows, num_columns)
    return x.to(tl.float32)


@triton.jit
def store_tile(base, x, rows, columns, num_rows, num_columns):
    """Store a matrix whose rows have no gaps."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def then(decay, state, next_decay, next_state):
    """Combine two stretches of a recurrence `h_t = decay_t h_(t-1) + added_t`."""
    return decay * next_decay, next_decay * state + next_state
