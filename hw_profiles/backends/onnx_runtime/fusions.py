"""Forms in which ONNX Runtime computes several of PyTorch's operators in one pass.

What they replace stays behind without a reader and is dropped from the graph.

Shapes: M tokens, N output rows, K columns.
"""

from __future__ import annotations

import torch

from hw_profiles.backends.onnx_runtime.builder import CONTRIB, Builder, Value

MIDDLE = 128
"""Added to int8 activations: for signed ones there is no fast product (20 to 70 times slower)."""


def times_rsqrt(b: Builder, x: Value, y: Value) -> Value | None:
    """Return `x * (1 / sqrt(z))` as a quotient, the form in which an RMS norm is recognised."""
    if root := b.made_by(y, "Reciprocal"):
        return b.op("Div", [x, root[0]], torch.broadcast_shapes(x.shape, y.shape), x.dtype)
    return None


def unsigned(b: Builder, x_MK: Value) -> Value:
    """Return int8 activations plus 128, as uint8; once for all maps that read them.

    Rounded quotients with a divisor per token are quantised in one pass.
    """
    key = ("unsigned", x_MK)
    if key in b.values:
        return b.values[key]
    cast = b.made_by(x_MK, "Cast")
    numbers = cast[0] if cast else b.cast(x_MK, torch.float32)
    rounded = b.made_by(numbers, "Round")
    quotient = b.made_by(rounded[0], "Div") if rounded else None
    if quotient and quotient[1].shape == (x_MK.shape[0], 1):
        scale_M = b.reshape(quotient[1], x_MK.shape[:1])
        zeros_M = b.full(scale_M.shape, MIDDLE, torch.uint8)
        inputs = [quotient[0], scale_M, zeros_M]
        value = b.op("QuantizeLinear", inputs, x_MK.shape, torch.uint8, axis=0)
    else:
        middle = b.scalar(float(MIDDLE), numbers.dtype)
        moved = b.op("Add", [numbers, middle], x_MK.shape, numbers.dtype)
        value = b.cast(moved, torch.uint8)
    b.values[key] = value
    return value


def integer_product(b: Builder, x_MK: Value, weight_KN: Value) -> Value:
    """Return the int32 product of int8 activations and weights."""
    inputs = [unsigned(b, x_MK), weight_KN, b.scalar(MIDDLE, torch.uint8)]
    shape = (x_MK.shape[0], weight_KN.shape[1])
    return b.op("MatMulInteger", inputs, shape, torch.int32)


def scaled_product(b: Builder, x_MN: Value, scale: Value) -> Value | None:
    """Return an integer product times token scales times row scales.

    Args:
        b: the graph.
        x_MN: recognised if it is a product in floating point times a scale per token.
        scale: a constant per output row, (N,), or one for all, (1,).
    """
    scaled = b.made_by(x_MN, "Mul")
    cast = b.made_by(scaled[0], "Cast") if scaled else None
    product = b.made_by(cast[0], "MatMulInteger") if cast else None
    if scale.tensor is None or scaled is None or product is None:
        return None
    rows_N = b.known(scale.tensor.expand(x_MN.shape[-1]).contiguous())
    inputs = [product[0], product[1], b.scalar(1.0, x_MN.dtype), rows_N, product[2]]
    out_MN = b.op("MatMulIntegerToFloat", inputs, x_MN.shape, x_MN.dtype, CONTRIB)
    return b.op("Mul", [out_MN, scaled[1]], x_MN.shape, x_MN.dtype)
