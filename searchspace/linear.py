"""The linear map every operator is made of: fp32, fake int8 for training, or real int8."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.int8_linear import (
    QuantizedActivations,
    fake_quantize_activations,
    fake_quantize_weight,
    int8_linear,
    quantize_activations,
    quantize_weight,
)


class Linear(nn.Module):
    """A linear map without bias.

    With ``precision="int8"`` it rounds weights and activations to the int8 grid while it keeps
    computing in floating point (so it can be trained); `pack` turns it into the integer form that
    really runs in int8.

    Args:
        in_features: K.
        out_features: N.
        precision: ``"fp32"`` or ``"int8"``.
    """

    weight: Tensor
    weight_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("weight_scale", None)

    @property
    def packed(self) -> bool:
        """Whether the weight is stored as int8."""
        return self.weight_scale is not None

    def reset(self, generator: torch.Generator, gain: float = 1.0) -> None:
        """Draw the weight from a normal of standard deviation `gain / sqrt(K)`."""
        with torch.no_grad():
            std = gain / math.sqrt(self.weight.shape[1])
            self.weight.normal_(0.0, std, generator=generator)

    def pack(self) -> None:
        """Replace the weight by int8 values and one scale per row; no-op for fp32."""
        if self.precision == "int8" and not self.packed:
            values, scale = quantize_weight(self.weight)
            del self.weight
            self.register_buffer("weight", values)
            self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor | QuantizedActivations) -> Tensor:
        """Map `x` (..., K) to (..., N); a packed layer also takes quantised activations."""
        if self.weight_scale is not None:
            quantized = x if isinstance(x, QuantizedActivations) else quantize_activations(x)
            return int8_linear(quantized, self.weight, self.weight_scale)
        assert isinstance(x, Tensor)
        if self.precision == "int8":
            return F.linear(fake_quantize_activations(x), fake_quantize_weight(self.weight))
        return F.linear(x, self.weight)


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """Apply several maps to the same input, quantising it once where they run in int8."""
    if linears[0].packed:
        shared = quantize_activations(x)
        return [linear(shared) for linear in linears]
    if linears[0].precision == "int8":
        rounded = fake_quantize_activations(x)
        return [F.linear(rounded, fake_quantize_weight(linear.weight)) for linear in linears]
    return [linear(x) for linear in linears]
