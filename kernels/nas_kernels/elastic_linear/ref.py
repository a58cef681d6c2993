"""The definition: slice, multiply, activate.

Shapes: M rows, k <= K inputs and n <= N outputs of a network, out of those of the maximal weight.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from nas_kernels.precision import product_dtype


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _same(x: Tensor) -> Tensor:
    return x


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _same,
    "gelu": _gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}
"""Activations of one projection."""
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": _gelu, "reglu": F.relu}
"""Activations of a gate that multiplies the projection."""


def elastic_linear_ref(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    gate_weight_NK: Tensor | None = None,
    gate_bias_N: Tensor | None = None,
) -> Tensor:
    """Compute `nas_kernels.elastic_linear.elastic_linear`; same arguments."""
    up = _projected(x, weight_NK, bias_N, out_features)
    if gate_weight_NK is None:
        return PLAIN[activation](up)
    return GATED[activation](_projected(x, gate_weight_NK, gate_bias_N, out_features)) * up


def _projected(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, n: int | None) -> Tensor:
    dtype, weight_nk = product_dtype(x, weight_NK), weight_NK[:n, : x.shape[-1]]
    bias_n = None if bias_N is None else bias_N[:n].to(dtype)
    return F.linear(x.to(dtype), weight_nk.to(dtype), bias_n)
