"""Which low-bit linear maps have no kernel on CUDA.

They would run on weights that are dequantised anew in each call. That is correct and slow, and a
search that took its time for the precision's would learn the wrong thing.

Shapes: M rows (tokens), N output rows and K columns of a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hw_profiles.backends.base import UnsupportedError
from nas_kernels import int4_linear, int8_weight_linear
from searchspace.linear import Linear

INT8_ROWS, INT8_MULTIPLE = 16, 8
"""PyTorch's integer product on CUDA needs more rows, and N and K that are multiples."""
FEW_ROWS = {"int4": int4_linear.KERNEL_TOKENS, "int8_weight": int8_weight_linear.KERNEL_TOKENS}
"""Rows up to which weights are read as they are stored, which only the CPU has kernels for. With
more, every device converts them first and multiplies in bf16."""


def lacking_kernel(precision: str, rows: int, out_features: int, in_features: int) -> str:
    """Return why a packed linear map has no kernel on CUDA; empty where it has one.

    Args:
        precision: a name in `PRECISIONS`.
        rows: M.
        out_features: N.
        in_features: K.
    """
    if precision in FEW_ROWS and rows <= FEW_ROWS[precision]:
        return f"{precision} weights have no CUDA kernel for {FEW_ROWS[precision]} rows and fewer"
    if precision in ("int8", "ternary"):
        even = out_features % INT8_MULTIPLE == 0 and in_features % INT8_MULTIPLE == 0
        if rows <= INT8_ROWS or not even:
            return (
                f"CUDA multiplies int8 above {INT8_ROWS} rows and in multiples of "
                f"{INT8_MULTIPLE} only"
            )
    return ""


@contextlib.contextmanager
def only_with_kernels(module: nn.Module) -> Iterator[None]:
    """Refuse, inside the block, to run packed linear maps that have no kernel on CUDA.

    Raises:
        UnsupportedError: saying which map, and why.
    """
    linears = [child for child in module.modules() if isinstance(child, Linear) and child.packed]
    handles = [linear.register_forward_pre_hook(_require_kernel) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_kernel(linear: nn.Module, args: tuple[Any, ...]) -> None:
    assert isinstance(linear, Linear)
    shape: torch.Size = args[0].shape
    rows, in_features, out_features = shape[:-1].numel(), shape[-1], linear.weight.shape[0]
    if reason := lacking_kernel(linear.precision, rows, out_features, in_features):
        raise UnsupportedError(
            f"a {linear.precision} map of {in_features} to {out_features} features cannot be timed "
            f"on {rows} rows with backend 'cuda': {reason}; leave the precision out of the search "
            "space, or give the workload a larger batch"
        )
