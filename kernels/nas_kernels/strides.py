"""Tensors as matrices whose rows kernels read by one stride.

Shapes: R rows, D columns.
"""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return `x` (..., D) as (R, D), elements of a row side by side.

    The leading columns of wider rows stay where they are; it is a copy only where no single stride
    leads from row to row.
    """
    return unit_rows(
        x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_rows(x), x.shape[-1])
    )


def any_rows(x: Tensor) -> Tensor:
    """Return `x` (..., D) as (R, D) with whatever strides, a copy only where no two will do."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def unit_rows(x_RD: Tensor) -> Tensor:
    """Return `x_RD` itself where elements of a row lie side by side, else a copy."""
    return x_RD if x_RD.stride(1) == 1 or x_RD.shape[1] == 1 else x_RD.contiguous()


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()
