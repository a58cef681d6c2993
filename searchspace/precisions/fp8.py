"""fp8: 8-bit floating-point weights and activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas_kernels.fp8_linear import (
    Fp8Activations,
    fake_quantize_activations,
    fake_quantize_weight,
    fp8_linear,
    quantize_activations,
    quantize_weight,
)
from searchspace.precisions.activations import Activations, PerTokenActivations
from searchspace.precisions.base import Runtime

E4M3 = PerTokenActivations(fake_quantize_activations, quantize_activations, Fp8Activations)


class Fp8:
    """One scale per output row and per token; e4m3, the form with more mantissa.

    For GPUs that multiply it. Everywhere else weights are dequantised in each call, which is exact
    and slower than fp32: there it saves bytes only.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", sections 2 and 3; Dettmers et
    al. 2022, "LLM.int8()", section 2.1 (a scale per row and token).
    """

    name = "fp8"
    bits = 8
    activations: Activations = E4M3

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round each row to its fp8 grid."""
        return fake_quantize_weight(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return float8_e4m3fn values (N, K) and fp32 scales (N,)."""
        values_NK, scale_N = quantize_weight(weight_NK)
        return {"weight": values_NK, "weight_scale": scale_N}

    def run(self, x: Fp8Activations, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T`, by the device's fp8 product where it has one."""
        return fp8_linear(x, stored["weight"], stored["weight_scale"])
