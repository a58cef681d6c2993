"""W8A8: int8 weights and activations, multiplied as integers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas_kernels.int8_linear import (
    QuantizedActivations,
    fake_quantize_weight,
    int8_linear,
    quantize_weight,
)
from searchspace.precisions.activations import INT8, Activations
from searchspace.precisions.base import Runtime


class Int8:
    """One scale per output row and per token.

    Source: Zafrir et al. 2019, "Q8BERT", section 2 (training); Dettmers et al. 2022, "LLM.int8()",
    section 2.1 (a scale per row and token).
    """

    name = "int8"
    bits = 8
    activations: Activations = INT8

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round each row to its int8 grid."""
        return fake_quantize_weight(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return int8 values (N, K) and fp32 scales (N,)."""
        values_NK, scale_N = quantize_weight(weight_NK)
        return {"weight": values_NK, "weight_scale": scale_N}

    def run(
        self, x: QuantizedActivations, stored: Mapping[str, Tensor], runtime: Runtime
    ) -> Tensor:
        """Return `x @ weight.T`, by the integer product."""
        return int8_linear(x, stored["weight"], stored["weight_scale"])
