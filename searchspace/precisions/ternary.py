"""Weights of -1, 0 and 1 in 2 bits, activations in int8 (BitNet b1.58)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas_kernels.dispatch import TRITON, may_have_kernels, use_triton
from nas_kernels.int8_linear import QuantizedActivations, int8_linear
from nas_kernels.ternary_linear import (
    fake_quantize_ternary,
    pack_ternary,
    quantize_ternary,
    ternary_linear,
    unpack_ternary,
)
from searchspace.precisions.activations import INT8, Activations
from searchspace.precisions.base import Runtime, kept


class Ternary:
    """One scale for the whole weight, the mean of its absolute values.

    Source: Ma et al. 2024, "The Era of 1-bit LLMs", section 2; Nielsen et al. 2024, "When are 1.58
    bits enough?", section 3.
    """

    name = "ternary"
    bits = 2
    activations: Activations = INT8

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round to the nearest of the three values."""
        return fake_quantize_ternary(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return four codes to a byte (N, ceil(K/4)) and the fp32 scale (1,)."""
        codes_NK, scale_1 = quantize_ternary(weight_NK)
        return {"weight": pack_ternary(codes_NK), "weight_scale": scale_1}

    def run(
        self, x: QuantizedActivations, stored: Mapping[str, Tensor], runtime: Runtime
    ) -> Tensor:
        """Return `x @ weight.T`: from stored codes, or from int8 ones made at the first call."""
        given = x.values_MK, stored["weight"], stored["weight_scale"]
        if may_have_kernels(x.values_MK) and use_triton("ternary_linear", *given):
            return ternary_linear(x, *given[1:], implementation=TRITON)
        codes_NK = kept(runtime, "codes", lambda: unpack_ternary(stored["weight"], x.shape[-1]))
        return int8_linear(x, codes_NK, stored["weight_scale"])
