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
from nas_kernels import fp8_linear, int4_linear, int8_weight_linear
from nas_kernels.dispatch import use_triton
from searchspace.linear import Linear

OWN_KERNELS = ("int8", "int8_weight", "int4", "ternary")
"""Precisions whose operation, of the name NAME_linear, is a Triton kernel for any size."""
INT8_ROWS, INT8_MULTIPLE = 16, 8
"""PyTorch's integer product on CUDA needs more rows, and N and K that are multiples."""
FEW_ROWS = {"int4": int4_linear.KERNEL_TOKENS, "int8_weight": int8_weight_linear.KERNEL_TOKENS}
"""Rows up to which weights are read as they are stored, for which PyTorch has kernels on the CPU
only. With more, every device converts them first and multiplies in bf16."""


def lacking_kernel(
    precision: str, rows: int, out_features: int, in_features: int, device: torch.device
) -> str:
    """Return why a packed linear map has no kernel on CUDA; empty where it has one.

    Args:
        precision: a name in `PRECISIONS`.
        rows: M.
        out_features: N.
        in_features: K.
        device: where its weights are.
    """
    if precision in OWN_KERNELS:
        there = torch.empty(0, device=device)
        if use_triton(f"{precision}_linear", there):
            return ""
    if precision == "fp8" and not fp8_linear.has_kernel(device, out_features, in_features):
        chip, multiple = ".".join(map(str, fp8_linear.OLDEST_CHIP)), fp8_linear.MULTIPLE
        return (
            f"fp8 is multiplied by GPUs of compute capability {chip} and later, in multiples of "
            f"{multiple}"
        )
    if precision in FEW_ROWS and rows <= FEW_ROWS[precision]:
        return (
            f"without Triton, {precision} weights have no CUDA kernel for {FEW_ROWS[precision]} "
            "rows and fewer"
        )
    if precision in ("int8", "ternary"):
        even = out_features % INT8_MULTIPLE == 0 and in_features % INT8_MULTIPLE == 0
        if rows <= INT8_ROWS or not even:
            return (
                f"without Triton, CUDA multiplies int8 above {INT8_ROWS} rows and in multiples of "
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
    sizes, device = (rows, out_features, in_features), linear.weight.device
    if reason := lacking_kernel(linear.precision, *sizes, device):
        others = "or widths that are multiples"
        if linear.precision in OWN_KERNELS:
            others = "install Triton, or give the workload a larger batch"
        raise UnsupportedError(
            f"a {linear.precision} map of {in_features} to {out_features} features cannot be timed "
            f"on {rows} rows with backend 'cuda': {reason}; leave the precision out of the search "
            f"space, {others}"
        )
