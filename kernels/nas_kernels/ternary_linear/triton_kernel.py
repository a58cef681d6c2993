"""int8 activations times ternary codes, widened in registers; inference only."""

from __future__ import annotations

from torch import Tensor

from nas_kernels.int8_linear.ref import QuantizedActivations
from nas_kernels.packed_linear.triton_kernel import packed_linear
from nas_kernels.ternary_linear.ref import CODES_PER_BYTE


def ternary_linear(
    x: QuantizedActivations, packed_NQ: Tensor, scale_1: Tensor, bias_N: Tensor | None
) -> Tensor:
    """Return `x @ weight.T + bias` of shape (..., N), in the dtype that was quantised."""
    out_MN = packed_linear(
        x.values_MK, packed_NQ, scale_1, x.scale_M1[:, 0], bias_N, CODES_PER_BYTE, x.dtype
    )
    return out_MN.view(*x.shape[:-1], packed_NQ.shape[0])
