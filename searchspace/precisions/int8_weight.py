"""W8A16: int8 weights, activations as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas_kernels.int8_weight_linear import fake_quantize_rows, int8_weight_linear, quantize_rows
from searchspace.precisions.activations import FLOAT, Activations
from searchspace.precisions.base import Runtime


class Int8Weight:
    """One scale per output row; saves bytes, and time where reading weights is what takes it.

    Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (row-wise absmax quantisation).
    """

    name = "int8_weight"
    bits = 8
    activations: Activations = FLOAT

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round each row to its int8 grid."""
        return fake_quantize_rows(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return int8 values (N, K) and bf16 scales (N,)."""
        values_NK, scale_N = quantize_rows(weight_NK)
        return {"weight": values_NK, "weight_scale": scale_N}

    def run(self, x: Tensor, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T`."""
        return int8_weight_linear(x, stored["weight"], stored["weight_scale"])
