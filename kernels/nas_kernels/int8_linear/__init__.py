"""W8A8 linear maps: int8 weights per output row, int8 activations per token."""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.fallback import report_fallback
from nas_kernels.int8_linear.ref import (
    QuantizedActivations,
    fake_quantize_activations,
    fake_quantize_weight,
    int8_linear_ref,
    quantize_activations,
    quantize_weight,
)

__all__ = [
    "QuantizedActivations",
    "fake_quantize_activations",
    "fake_quantize_weight",
    "int8_linear",
    "int8_linear_ref",
    "quantize_activations",
    "quantize_weight",
]


def int8_linear(x: QuantizedActivations, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return `x @ weight.T` of shape (..., N), in the dtype that was quantised.

    `torch._int_mm` was measured to beat the deprecated quantised-tensor operators of PyTorch once
    the activations of several projections are quantised together, needs no packed copy, and is
    exact. Against fp32 it wins from some tokens on and loses at one.

    Args:
        x: the quantised input of shape (..., K).
        weight_NK: int8 values; strided views are fine.
        scale_N: fp32 scale of each output row, or one for all, of shape (1,).
    """
    if not _has_kernel(x.values_MK, weight_NK):
        return int8_linear_ref(x, weight_NK, scale_N)
    acc_MN = torch._int_mm(x.values_MK, weight_NK.t())
    # Converting first is nearly twice as fast as a product of int32 and fp32.
    out_MN = acc_MN.to(x.scale_M1.dtype).mul_(x.scale_M1).mul_(scale_N)
    return out_MN.to(x.dtype).view(*x.shape[:-1], -1)


def _has_kernel(values_MK: Tensor, weight_NK: Tensor) -> bool:
    rows, (out_features, in_features) = values_MK.shape[0], weight_NK.shape
    if values_MK.device.type in ("cpu", "meta"):
        # With one column, whose strides say nothing, PyTorch's product is garbage on the CPU.
        return in_features > 1
    if values_MK.is_cuda and rows > 16 and out_features % 8 == 0 and in_features % 8 == 0:
        return True
    report_fallback(
        "int8_linear",
        f"{values_MK.device.type} multiplies int8 above 16 rows and in multiples of 8 only",
    )
    return False
