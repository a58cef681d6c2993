"""Weight-only int8 linear maps (W8A16): int8 weights per output row, bf16 activations."""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.bf16_linear import bf16_linear, fresh_bf16_rows
from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.fallback import report_fallback
from nas_kernels.int8_weight_linear.ref import (
    dequantize_rows,
    fake_quantize_rows,
    int8_weight_linear_ref,
    quantize_rows,
)

__all__ = [
    "dequantize_rows",
    "fake_quantize_rows",
    "int8_weight_linear",
    "int8_weight_linear_ref",
    "quantize_rows",
]

# The kernel reads the weights once per token: measured at 768 x 768 on one AMX core, 34 us against
# 91 (fp32) at 1 token, but 262 against 223 for converted weights at 16 and 3.9 ms against 0.6 at
# 256.
KERNEL_TOKENS = 8
# It reads 16 columns at a time, by instructions that end the process where an address is not
# aligned: seen at 33 and 40 columns, and on weights that were views into a file.
KERNEL_COLUMNS, ALIGNMENT = 16, 64


def int8_weight_linear(
    x: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `x @ (scale * weight).T + bias` of shape (..., N) in the dtype of `x`.

    Kernels have no gradient; where `x` wants one, PyTorch's operators run.

    Args:
        x: (..., K), floating point.
        weight_NK: int8; strided views, as leading rows and columns of a larger weight, are fine.
        scale_N: bf16 scale of each output row.
        bias_N: floating point, added to the result.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    unsupported = "it has no gradient" if wants_gradient(x, bias_N) else None
    tensors = (x, weight_NK, scale_N, bias_N)
    if use_triton(
        "int8_weight_linear", *tensors, implementation=implementation, unsupported=unsupported
    ):
        from nas_kernels.int8_weight_linear import triton_kernel

        return triton_kernel.int8_weight_linear(x, weight_NK, scale_N, bias_N)
    out = _in_torch(x, weight_NK, scale_N)
    return out if bias_N is None else out + bias_N.to(out.dtype)


def _in_torch(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    if x.numel() <= KERNEL_TOKENS * x.shape[-1] and _has_kernel(x, weight_NK):
        out_MN = torch._weight_int8pack_mm(fresh_bf16_rows(x), weight_NK, scale_N)
        return out_MN.to(x.dtype).view(*x.shape[:-1], -1)
    # int8 values are exact in bf16, and scaling the result is cheaper than scaling the weights.
    return bf16_linear(x, weight_NK) * scale_N.to(x.dtype)


def _has_kernel(x: Tensor, weight_NK: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    whole = weight_NK.is_contiguous() and weight_NK.shape[1] % KERNEL_COLUMNS == 0
    if x.is_cpu and whole and _is_aligned(weight_NK):
        return True
    report_fallback(
        "int8_weight_linear",
        f"the kernel is for CPUs, multiples of {KERNEL_COLUMNS} columns and memory of its own",
    )
    return False


def _is_aligned(tensor: Tensor) -> bool:
    # Subclasses stand for programs being traced; they have no address.
    return type(tensor) is Tensor and tensor.data_ptr() % ALIGNMENT == 0
