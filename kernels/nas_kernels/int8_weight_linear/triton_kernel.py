"""int8 weights times floating activations; inference only."""

from __future__ import annotations

from torch import Tensor

from nas_kernels.packed_linear.triton_kernel import packed_linear
from nas_kernels.strides import any_rows


def int8_weight_linear(
    x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None
) -> Tensor:
    """Return `x @ (scale * weight).T + bias` of shape (..., N) in the dtype of `x`."""
    out_MN = packed_linear(any_rows(x), weight_NK, scale_N, None, bias_N, codes=1, dtype=x.dtype)
    return out_MN.view(*x.shape[:-1], weight_NK.shape[0])
