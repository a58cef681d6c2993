"""W8A8 linear maps: int8 weights per output row, int8 activations per token."""

from nas_kernels.int8_linear.ref import (
    QuantizedActivations,
    fake_quantize_activations,
    fake_quantize_weight,
    int8_linear,
    quantize_activations,
    quantize_weight,
)

__all__ = [
    "QuantizedActivations",
    "fake_quantize_activations",
    "fake_quantize_weight",
    "int8_linear",
    "quantize_activations",
    "quantize_weight",
]
