"""Ternary linear maps (W1.58A8): weights of -1, 0 or 1, stored in 2 bits, run in int8.

No CPU or GPU multiplies 2-bit codes; like BitNet's own kernels for batches, the codes are widened
to int8 (once, by the caller, who keeps the result) and run by the integer product.
"""

from nas_kernels.ternary_linear.ref import (
    fake_quantize_ternary,
    pack_ternary,
    quantize_ternary,
    ternary_linear_ref,
    unpack_ternary,
)

__all__ = [
    "fake_quantize_ternary",
    "pack_ternary",
    "quantize_ternary",
    "ternary_linear_ref",
    "unpack_ternary",
]
