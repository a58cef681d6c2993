"""PyTorch's operators on single numbers, sums and norms, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Builder, Value
from hw_profiles.backends.onnx_runtime.fusions import scaled_product, times_rsqrt
from hw_profiles.backends.onnx_runtime.translations import Handler, Table

MATHS = Table()


def _unary(kind: str) -> Handler:
    return lambda b, out, x, *_: b.op(kind, [x], out.shape, out.dtype)


for _name, _kind in {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "bitwise_not": "Not",
    "logical_not": "Not",
}.items():
    MATHS[f"aten.{_name}.default"] = _unary(_kind)


def operand(b: Builder, value: Value | float, dtype: torch.dtype) -> Value:
    """Return a number or a tensor in a dtype."""
    return b.cast(value, dtype) if isinstance(value, Value) else b.scalar(value, dtype)


def _binary(kind: str) -> Handler:
    def handler(b: Builder, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Value:
        x, y = operand(b, x, out.dtype), operand(b, y, out.dtype)
        if alpha != 1:
            y = b.op("Mul", [y, b.scalar(alpha, out.dtype)], y.shape, out.dtype)
        return b.op(kind, [x, y], out.shape, out.dtype)

    return handler


for _name, _kind in {
    "add.Tensor": "Add",
    "add.Scalar": "Add",
    "sub.Tensor": "Sub",
    "sub.Scalar": "Sub",
    "div.Tensor": "Div",
    "div.Scalar": "Div",
    "mul.Scalar": "Mul",
    "maximum.default": "Max",
    "minimum.default": "Min",
    "pow.Tensor_Tensor": "Pow",
    "pow.Tensor_Scalar": "Pow",
    "pow.Scalar": "Pow",
    "bitwise_and.Tensor": "And",
    "bitwise_or.Tensor": "Or",
    "logical_and.default": "And",
    "logical_or.default": "Or",
}.items():
    MATHS[f"aten.{_name}"] = _binary(_kind)


@MATHS.translates("aten.mul.Tensor")
def _mul(b: Builder, out: Tensor, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        fused = times_rsqrt(b, x, y) or scaled_product(b, x, y)
        if fused is not None:
            return fused
    return _binary("Mul")(b, out, x, y)


def _comparison(kind: str, negated: bool = False) -> Handler:
    def handler(b: Builder, out: Tensor, x: Value, y: Any) -> Value:
        found = b.op(kind, [x, operand(b, y, x.dtype)], out.shape, torch.bool)
        return b.op("Not", [found], out.shape, torch.bool) if negated else found

    return handler


for _name, _kind in {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}.items():
    MATHS[f"aten.{_name}.Scalar"] = MATHS[f"aten.{_name}.Tensor"] = _comparison(_kind)
MATHS["aten.ne.Scalar"] = MATHS["aten.ne.Tensor"] = _comparison("Equal", negated=True)


@MATHS.translates("aten.rsub.Scalar")
def _rsub(b: Builder, out: Tensor, x: Value, y: float) -> Value:
    return b.op("Sub", [b.scalar(y, out.dtype), x], out.shape, out.dtype)


@MATHS.translates("aten.rsqrt.default")
def _rsqrt(b: Builder, out: Tensor, x: Value) -> Value:
    root = b.op("Sqrt", [x], out.shape, out.dtype)
    return b.op("Reciprocal", [root], out.shape, out.dtype)


@MATHS.translates("aten.log1p.default")
def _log1p(b: Builder, out: Tensor, x: Value) -> Value:
    more = b.op("Add", [x, b.scalar(1, out.dtype)], out.shape, out.dtype)
    return b.op("Log", [more], out.shape, out.dtype)


@MATHS.translates("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(b: Builder, out: Tensor, x: Value, low: Any = None, high: Any = None) -> Value:
    bounds = [None if v is None else b.scalar(v, out.dtype) for v in (low, high)]
    return b.op("Clip", [x, *bounds], out.shape, out.dtype)


MATHS["aten.clamp_max.default"] = lambda b, out, x, high: _clamp(b, out, x, None, high)


@MATHS.translates("aten.addcmul.default")
def _addcmul(b: Builder, out: Tensor, x: Value, y: Value, z: Value, *, value: float = 1) -> Value:
    shape = torch.broadcast_shapes(y.shape, z.shape)
    product = b.op("Mul", [y, z], shape, out.dtype)
    if value != 1:
        product = b.op("Mul", [product, b.scalar(value, out.dtype)], shape, out.dtype)
    return b.op("Add", [x, product], out.shape, out.dtype)


@MATHS.translates("aten.silu.default")
def _silu(b: Builder, out: Tensor, x: Value) -> Value:
    gate = b.op("Sigmoid", [x], out.shape, out.dtype)
    return b.op("Mul", [x, gate], out.shape, out.dtype)


@MATHS.translates("aten.gelu.default")
def _gelu(b: Builder, out: Tensor, x: Value, *, approximate: str = "none") -> Value:
    return b.op("Gelu", [x], out.shape, out.dtype, approximate=approximate)


@MATHS.translates("aten.elu.default")
def _elu(b: Builder, out: Tensor, x: Value, alpha: float = 1.0) -> Value:
    return b.op("Elu", [x], out.shape, out.dtype, alpha=float(alpha))


@MATHS.translates("aten.softplus.default")
def _softplus(b: Builder, out: Tensor, x: Value) -> Value:
    return b.op("Softplus", [x], out.shape, out.dtype)


@MATHS.translates("aten.log_sigmoid_forward.default")
def _log_sigmoid(b: Builder, out: Any, x: Value) -> list[Value]:
    positive = b.op("Softplus", [b.op("Neg", [x], x.shape, x.dtype)], x.shape, x.dtype)
    return [b.op("Neg", [positive], x.shape, x.dtype)]


@MATHS.translates("aten.logaddexp.default")
def log_add_exp(b: Builder, out: Tensor, x: Value, y: Value) -> Value:
    """Translate `log(exp(x) + exp(y))`, by the larger of them."""
    shape, dtype = out.shape, out.dtype
    gap = b.op("Abs", [b.op("Sub", [x, y], shape, dtype)], shape, dtype)
    rest = b.op("Softplus", [b.op("Neg", [gap], shape, dtype)], shape, dtype)
    return b.op("Add", [b.op("Max", [x, y], shape, dtype), rest], shape, dtype)


def _reduction(kind: str) -> Handler:
    def handler(
        b: Builder, out: Tensor, x: Value, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> Value:
        dims = [dim] if isinstance(dim, int) else list(dim or range(len(x.shape)))
        x = b.cast(x, out.dtype)
        return b.op(kind, [x, b.sizes(*dims)], out.shape, out.dtype, keepdims=int(keepdim))

    return handler


for _name, _kind in {
    "sum.dim_IntList": "ReduceSum",
    "sum.default": "ReduceSum",
    "mean.dim": "ReduceMean",
    "mean.default": "ReduceMean",
    "amax.default": "ReduceMax",
    "amin.default": "ReduceMin",
    "logsumexp.default": "ReduceLogSumExp",
}.items():
    MATHS[f"aten.{_name}"] = _reduction(_kind)


@MATHS.translates("aten.linalg_vector_norm.default")
def _norm(b: Builder, out: Tensor, x: Value, order: float = 2, *args: Any, **kwargs: Any) -> Value:
    if order != 2:
        raise NotImplementedError(f"a vector norm of order {order}")
    return _reduction("ReduceL2")(b, out, x, *args, **kwargs)


@MATHS.translates("aten.cumsum.default")
def _cumsum(b: Builder, out: Tensor, x: Value, dim: int, **_: Any) -> Value:
    axis = b.scalar(dim, torch.int64)
    return b.op("CumSum", [b.cast(x, out.dtype), axis], out.shape, out.dtype)


@MATHS.translates("aten._softmax.default", "aten._safe_softmax.default")
def _softmax(b: Builder, out: Tensor, x: Value, dim: int, *_: Any) -> Value:
    return b.op("Softmax", [x], out.shape, out.dtype, axis=dim)


@MATHS.translates("aten.native_layer_norm.default")
def _layer_norm(
    b: Builder, out: Any, x: Value, shape: Sequence[int], scale: Any, bias: Any, eps: float
) -> list[Value]:
    scale = scale or b.known(torch.ones(tuple(shape), dtype=x.dtype))
    inputs = [x, scale, bias]
    axis = -len(shape)
    return [b.op("LayerNormalization", inputs, x.shape, x.dtype, epsilon=eps, axis=axis)]
