"""PyTorch's operators that make tensors from sizes, as ONNX nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Builder, Value
from hw_profiles.backends.onnx_runtime.maths import operand
from hw_profiles.backends.onnx_runtime.translations import Table
from nas.export.onnx.builder import FreeBuilder
from nas_kernels.int8_linear import quantize_weight

FACTORIES = Table()
FILLED = {
    "zeros": 0,
    "zeros_like": 0,
    "new_zeros": 0,
    "empty": 0,
    "empty_like": 0,
    "new_empty": 0,
    "ones": 1,
    "ones_like": 1,
    "new_ones": 1,
    "full": None,
    "full_like": None,
    "new_full": None,
}
"""Operators whose result is one number everywhere, and the number; None where it is given."""


def filling(name: str, args: tuple[Any, ...]) -> Any:
    """Return the number an operator in `FILLED` fills with."""
    number = FILLED[name]
    if number is not None:
        return number
    return args[2] if name == "new_full" else args[1]


@FACTORIES.translates("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(b: Builder, out: Tensor, *bounds: Any, **_: Any) -> Value:
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    given = [b.scalar(number, torch.int64) for number in (start, end, step)]
    return b.cast(b.op("Range", given, out.shape, torch.int64), out.dtype)


@FACTORIES.translates("aten.scalar_tensor.default")
def _scalar(b: Builder, out: Tensor, number: Any, **_: Any) -> Value:
    return b.scalar(number, out.dtype)


@FACTORIES.translates("aten.embedding.default")
def _embedding(b: Builder, out: Tensor, table: Value, ids: Value, *_: Any) -> Value:
    """Look rows up; of a rounded table a row and its scale."""
    if not (isinstance(b, FreeBuilder) and b.int8_tables and table.tensor is not None):
        return b.op("Gather", [table, ids], out.shape, out.dtype, axis=0)
    values, scale = quantize_weight(table.tensor)
    found = b.op("Gather", [b.known(values), ids], out.shape, torch.int8, axis=0)
    shape = (*out.shape[:-1], 1)
    factor = b.op("Gather", [b.known(scale[:, None]), ids], shape, out.dtype, axis=0)
    return b.op("Mul", [b.cast(found, out.dtype), factor], out.shape, out.dtype)


@FACTORIES.translates("aten.remainder.Scalar", "aten.remainder.Tensor")
def _remainder(b: Builder, out: Tensor, x: Value, y: Any) -> Value:
    return b.op("Mod", [x, operand(b, y, out.dtype)], out.shape, out.dtype)


@FACTORIES.translates("aten.floor_divide.default", "aten.floor_divide.Scalar")
def _floor_divide(b: Builder, out: Tensor, x: Value, y: Any) -> Value:
    """Divide positions, which are not negative."""
    return b.op("Div", [x, operand(b, y, out.dtype)], out.shape, out.dtype)
