"""Weight-only int4 linear maps (W4A16): 4-bit weights in groups of 32 columns.

Shapes: N output rows, K columns, P stored bytes per row, G groups of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nas_kernels.bf16_linear import bf16_linear, fresh_bf16_rows
from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.fallback import report_fallback
from nas_kernels.int4_linear.ref import (
    GROUP,
    Int4Weight,
    dequantize_int4,
    fake_quantize_int4,
    int4_linear_ref,
    quantize_int4,
    unpack_nibbles,
)

__all__ = [
    "GROUP",
    "Int4Kernel",
    "Int4Weight",
    "dequantize_int4",
    "fake_quantize_int4",
    "has_kernel",
    "int4_linear",
    "int4_linear_ref",
    "kernel_layout",
    "prefers_kernel",
    "quantize_int4",
]

# The kernel reads the weights once per token: measured at 768 x 768 on one AMX core, 41 us against
# 91 (fp32) at 1 token and as fast as dequantising first at 32, but 3.9 ms against 0.9 at 256.
KERNEL_TOKENS = 32
KERNEL_ROWS = 16


class Int4Kernel(NamedTuple):
    """The layout PyTorch's CPU kernel wants: as many bytes again as what is stored."""

    weight: Tensor
    scale_zero_GN2: Tensor


def has_kernel(device: torch.device, out_features: int, in_features: int) -> bool:
    """Whether a weight of this size has a `kernel_layout` to run from."""
    if device.type == "cpu" and out_features % KERNEL_ROWS == 0 and in_features % GROUP == 0:
        return True
    if device.type == "cuda":
        # There, `int4_linear` has one that reads the stored form.
        return False
    report_fallback(
        "int4_linear",
        f"the kernel is for CPUs, multiples of {KERNEL_ROWS} rows and of {GROUP} columns",
    )
    return False


def prefers_kernel(x: Tensor) -> bool:
    """Whether an input (..., K) is better run by the kernel than by dequantising the weight."""
    return x.dtype != torch.float64 and x.numel() <= KERNEL_TOKENS * x.shape[-1]


def kernel_layout(weight: Int4Weight, in_features: int) -> Int4Kernel:
    """Return the kernel's own copy of a weight for which `has_kernel` holds."""
    codes_NK = unpack_nibbles(weight.packed_NP, in_features).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
    scale_zero_NG2 = torch.stack([weight.scale_NG, weight.zero_NG], dim=-1)
    return Int4Kernel(packed, scale_zero_NG2.transpose(0, 1).contiguous())


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    kernel: Int4Kernel | None = None,
    bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N) in the dtype of `x`.

    `weight` may be the leading rows and columns of a larger one: slices of its three tensors, with
    at least the bytes and groups that K columns need. Kernels have no gradient; where `x` wants
    one, the weight is dequantised.

    Args:
        x: (..., K), floating point.
        weight: what `quantize_int4` returned.
        kernel: from `kernel_layout`, for the CPU's kernel.
        bias_N: floating point, added to the result.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    if kernel is None and _use_triton(x, weight, bias_N, implementation):
        from nas_kernels.int4_linear import triton_kernel

        return triton_kernel.int4_linear(x, weight, bias_N)
    out = _in_torch(x, weight, kernel)
    return out if bias_N is None else out + bias_N.to(out.dtype)


def _use_triton(x: Tensor, weight: Int4Weight, bias_N: Tensor | None, implementation: str) -> bool:
    unsupported = "it has no gradient" if wants_gradient(x, bias_N) else None
    return use_triton(
        "int4_linear", x, *weight, bias_N, implementation=implementation, unsupported=unsupported
    )


def _in_torch(x: Tensor, weight: Int4Weight, kernel: Int4Kernel | None) -> Tensor:
    if kernel is None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return bf16_linear(x, dequantize_int4(weight, x.shape[-1], dtype))
    out_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(
        fresh_bf16_rows(x), kernel.weight, GROUP, kernel.scale_zero_GN2
    )
    return out_MN.to(x.dtype).view(*x.shape[:-1], -1)
