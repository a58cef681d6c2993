"""Ternary linear maps (W1.58A8): weights of -1, 0 or 1, stored in 2 bits, run in int8.

No CPU or GPU multiplies 2-bit codes; like BitNet's own kernels for batches, the codes are widened
to int8. A caller on the CPU does that once, keeps the result and runs it by the integer product;
the Triton kernel widens them in registers, so memory is read at 2 bits a weight.
"""

from __future__ import annotations

from torch import Tensor

from nas_kernels.dispatch import AUTO, REFERENCE, use_triton, wants_gradient
from nas_kernels.int8_linear import QuantizedActivations, int8_linear
from nas_kernels.ternary_linear.ref import (
    fake_quantize_ternary,
    pack_ternary,
    quantize_ternary,
    ternary_linear_ref,
    unpack_ternary,
)

__all__ = [
    "fake_quantize_ternary",
    "pack_ternary",
    "quantize_ternary",
    "ternary_linear",
    "ternary_linear_ref",
    "unpack_ternary",
]


def ternary_linear(
    x: QuantizedActivations,
    packed_NQ: Tensor,
    scale_1: Tensor,
    bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N), in the dtype that was quantised.

    Inference only: there is no gradient.

    Args:
        x: the quantised input of shape (..., K).
        packed_NQ: from `pack_ternary`, or leading rows and columns of one, at least ceil(K/4).
        scale_1: fp32 (1,), or (N,).
        bias_N: floating point, added before the result is rounded.
        implementation: see `nas_kernels.dispatch.use_triton`.
    """
    tensors = (x.values_MK, packed_NQ, scale_1, x.scale_M1, bias_N)
    unsupported = "it has no gradient" if wants_gradient(bias_N) else None
    if use_triton(
        "ternary_linear", *tensors, implementation=implementation, unsupported=unsupported
    ):
        from nas_kernels.ternary_linear import triton_kernel

        return triton_kernel.ternary_linear(x, packed_NQ, scale_1, bias_N)
    codes_NK = unpack_ternary(packed_NQ, x.shape[-1])
    return int8_linear(x, codes_NK, scale_1, bias_N, REFERENCE)
