"""W4A16: 4-bit weights in groups of 32 columns, activations as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas_kernels.int4_linear import (
    Int4Weight,
    fake_quantize_int4,
    has_kernel,
    int4_linear,
    kernel_layout,
    prefers_kernel,
    quantize_int4,
)
from searchspace.precisions.activations import FLOAT, Activations
from searchspace.precisions.base import Runtime, kept


class Int4:
    """A bf16 scale and zero point per row and group: 5 bits a weight in all.

    Source: Frantar et al. 2023, "GPTQ", section 4 (grouping); the grid is its round-to-nearest one.
    """

    name = "int4"
    bits = 4
    activations: Activations = FLOAT

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round each group to its 16 levels."""
        return fake_quantize_int4(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return nibbles (N, ceil(K/2)), and scales and zero points (N, ceil(K/32))."""
        packed_NP, scale_NG, zero_NG = quantize_int4(weight_NK)
        return {"weight": packed_NP, "weight_scale": scale_NG, "weight_zero": zero_NG}

    def run(self, x: Tensor, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T`."""
        names = ("weight", "weight_scale", "weight_zero")
        weight = Int4Weight(*(stored[name] for name in names))
        if not (prefers_kernel(x) and has_kernel(x.device, len(weight.packed_NP), x.shape[-1])):
            return int4_linear(x, weight)
        layout = kept(runtime, "kernel", lambda: kernel_layout(weight, x.shape[-1]))
        return int4_linear(x, weight, layout)
