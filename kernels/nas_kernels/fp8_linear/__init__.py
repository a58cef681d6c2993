"""fp8 linear maps (e4m3fn): weights with a scale per output row, activations with one per token.

GPUs from compute capability 8.9 on multiply fp8, and PyTorch has that product: only rounding the
activations is a kernel of our own. Everywhere else what is stored is dequantised anew in each call
and multiplied in fp32, which is exact, and slower than weights in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.fallback import report_fallback
from nas_kernels.fp8_linear import ref
from nas_kernels.fp8_linear.ref import (
    FP8,
    Fp8Activations,
    fake_quantize_activations,
    fake_quantize_weight,
    fp8_linear_ref,
    quantize_weight,
)

__all__ = [
    "FP8",
    "Fp8Activations",
    "fake_quantize_activations",
    "fake_quantize_weight",
    "fp8_linear",
    "fp8_linear_ref",
    "has_kernel",
    "quantize_activations",
    "quantize_weight",
]

MULTIPLE = 16
"""Of N and K, in PyTorch's product; memory has to begin at a multiple of as many bytes."""
OLDEST_CHIP = (8, 9)
"""Compute capability from which GPUs multiply fp8."""


def has_kernel(device: torch.device, out_features: int, in_features: int) -> bool:
    """Whether a device multiplies fp8 in this size; with any number of tokens."""
    if min(out_features, in_features) == 0 or out_features % MULTIPLE or in_features % MULTIPLE:
        return False
    return device.type == "cuda" and _capability(device) >= OLDEST_CHIP


def quantize_activations(x: Tensor, implementation: str = AUTO) -> Fp8Activations:
    """Quantise `x` (..., K) with one scale per row, of at least fp32.

    Args:
        x: floating point; any strides.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    unsupported = "it has no gradient" if wants_gradient(x) else None
    if x.shape[-1] == 0:
        unsupported = "rows without columns have no scale"
    elif x.is_cuda and _capability(x.device) < OLDEST_CHIP:
        unsupported = "the GPU has no fp8"
    if use_triton("quantize_fp8", x, implementation=implementation, unsupported=unsupported):
        from nas_kernels.fp8_linear import triton_kernel

        return triton_kernel.quantize_activations(x)
    return ref.quantize_activations(x)


def fp8_linear(x: Fp8Activations, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N), in the dtype that was quantised.

    Inference only: there is no gradient. The GPU's product sums in fp32 and rounds results to bf16.

    Args:
        x: the quantised input of shape (..., K).
        weight_NK: fp8 values.
        scale_N: fp32 scale of each output row.

    Source: PyTorch, `torch._scaled_mm` (row-wise scales).
    """
    if not _multiplies(x, weight_NK):
        return fp8_linear_ref(x, weight_NK, scale_N)
    out_MN = torch._scaled_mm(
        x.values_MK,
        weight_NK.t(),
        scale_a=x.scale_M1,
        scale_b=scale_N[None],
        out_dtype=torch.bfloat16,
    )
    return out_MN.to(x.dtype).view(*x.shape[:-1], len(weight_NK))


def _multiplies(x: Fp8Activations, weight_NK: Tensor) -> bool:
    """Whether these tensors are what the device's product takes."""
    values_MK = x.values_MK
    if not has_kernel(values_MK.device, *weight_NK.shape):
        report_fallback(
            "fp8_linear",
            f"{values_MK.device.type} does not multiply fp8, or not in this size: it takes compute "
            f"capability {OLDEST_CHIP[0]}.{OLDEST_CHIP[1]} and multiples of {MULTIPLE}",
        )
        return False
    if values_MK.shape[0] == 0 or x.scale_M1.dtype != torch.float32:
        return False
    return all(
        matrix.dtype == FP8 and matrix.is_contiguous() and _is_aligned(matrix)
        for matrix in (values_MK, weight_NK)
    )


def _is_aligned(tensor: Tensor) -> bool:
    # Subclasses stand for programs being traced; they have no address.
    return type(tensor) is not Tensor or tensor.data_ptr() % MULTIPLE == 0


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
