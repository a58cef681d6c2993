"""W8A8 linear maps: int8 weights per output row, int8 activations per token."""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.fallback import report_fallback
from nas_kernels.int8_linear import ref
from nas_kernels.int8_linear.ref import (
    QuantizedActivations,
    fake_quantize_activations,
    fake_quantize_weight,
    int8_linear_ref,
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


def quantize_activations(
    x: Tensor, in_features: int | None = None, implementation: str = AUTO
) -> QuantizedActivations:
    """Quantise the leading columns of `x` with one scale per row, of at least fp32.

    The kernel reads wider rows through their stride and gives the reference's values bit for bit.

    Args:
        x: (..., at least K), floating point.
        in_features: K; all columns by default.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    in_features = x.shape[-1] if in_features is None else in_features
    if in_features > x.shape[-1]:
        raise ValueError(f"in_features={in_features} is more than the {x.shape[-1]} columns given")
    unsupported = "it has no gradient" if wants_gradient(x) else None
    if in_features == 0:
        unsupported = "rows without columns have no scale"
    if use_triton(
        "quantize_activations", x, implementation=implementation, unsupported=unsupported
    ):
        from nas_kernels.int8_linear import triton_kernel

        return triton_kernel.quantize_activations(x, in_features)
    return ref.quantize_activations(x[..., :in_features])


def int8_linear(
    x: QuantizedActivations,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N), in the dtype that was quantised.

    Integer sums are exact, so without a bias all implementations agree bit for bit, up to the
    order in which the two scales are applied. Inference only: there is no gradient.

    `torch._int_mm` was measured to beat the deprecated quantised-tensor operators of PyTorch once
    the activations of several projections are quantised together, needs no packed copy, and is
    exact. Against fp32 it wins from some tokens on and loses at one.

    Args:
        x: the quantised input of shape (..., K).
        weight_NK: int8 values; strided views are fine.
        scale_N: fp32 scale of each output row, or one for all, of shape (1,).
        bias_N: floating point, added before the result is rounded.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    tensors = (x.values_MK, weight_NK, scale_N, x.scale_M1, bias_N)
    unsupported = "it has no gradient" if wants_gradient(bias_N) else None
    if use_triton("int8_linear", *tensors, implementation=implementation, unsupported=unsupported):
        from nas_kernels.int8_linear import triton_kernel

        return triton_kernel.int8_linear(x, weight_NK, scale_N, bias_N)
    if not _has_kernel(x.values_MK, weight_NK):
        out = int8_linear_ref(x, weight_NK, scale_N)
        return out if bias_N is None else out + bias_N.to(out.dtype)
    acc_MN = torch._int_mm(x.values_MK, weight_NK.t())
    # Converting first is nearly twice as fast as a product of int32 and fp32.
    out_MN = acc_MN.to(x.scale_M1.dtype).mul_(x.scale_M1).mul_(scale_N)
    if bias_N is not None:
        out_MN += bias_N
    return out_MN.to(x.dtype).view(*x.shape[:-1], len(weight_NK))


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
