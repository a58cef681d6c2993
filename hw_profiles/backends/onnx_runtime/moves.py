"""PyTorch's operators that move numbers, as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Builder, Like, Value
from hw_profiles.backends.onnx_runtime.maths import log_add_exp, operand
from hw_profiles.backends.onnx_runtime.translations import Table

MOVES = Table()
END = (1 << 62) - 1


@MOVES.translates("aten.clone.default", "aten.alias.default", "aten.detach.default")
@MOVES.translates("aten.lift_fresh_copy.default", "aten.contiguous.default")
def _same(b: Builder, out: Tensor, x: Value, **_: Any) -> Value:
    return x


@MOVES.translates("aten._to_copy.default")
def _cast(b: Builder, out: Tensor, x: Value, **_: Any) -> Value:
    return b.cast(x, out.dtype)


@MOVES.translates("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
@MOVES.translates("aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def _view(b: Builder, out: Tensor, x: Value, *_: Any) -> Value:
    return b.reshape(x, out.shape)


@MOVES.translates("aten.permute.default")
def permute(b: Builder, out: Tensor, x: Value, order: Sequence[int]) -> Value:
    """Translate a change of the order of axes; where only axes of size 1 move, nothing does."""
    order = [axis % len(x.shape) for axis in order]
    moving = [axis for axis in order if x.shape[axis] > 1]
    if moving == sorted(moving):
        return b.reshape(x, out.shape)
    return b.op("Transpose", [x], out.shape, out.dtype, perm=order)


@MOVES.translates("aten.transpose.int")
def _transpose(b: Builder, out: Tensor, x: Value, first: int, second: int) -> Value:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return permute(b, out, x, order)


@MOVES.translates("aten.t.default")
def _t(b: Builder, out: Tensor, x: Value) -> Value:
    return permute(b, out, x, range(len(x.shape))[::-1])


@MOVES.translates("aten.expand.default", "aten.copy.default")
def expand(b: Builder, out: Tensor, x: Value, *rest: Any, **_: Any) -> Value:
    """Repeat along dimensions of size 1, or copy with the destination's dtype."""
    if rest and isinstance(rest[0], Value):
        x = b.cast(rest[0], out.dtype)  # copy(destination, source)
    if x.shape == tuple(out.shape):
        return x
    # The operator keeps what is wider than it is asked for.
    added = len(out.shape) - len(x.shape)
    before = (*[1] * added, *x.shape)
    wanted = [new if old == 1 else 1 for old, new in zip(before, out.shape, strict=True)]
    repeated = b.op("Expand", [x, b.sizes(*wanted)], out.shape, out.dtype)
    if added and x.shape == out.shape[added:]:
        b.values["repeated", repeated] = x
    return repeated


@MOVES.translates("aten.repeat.default")
def _repeat(b: Builder, out: Tensor, x: Value, times: Sequence[int]) -> Value:
    x = b.reshape(x, (1,) * (len(times) - len(x.shape)) + x.shape)
    return b.op("Tile", [x, b.sizes(*times)], out.shape, out.dtype)


@MOVES.translates("aten.slice.Tensor")
def _slice(
    b: Builder, out: Tensor, x: Value, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    if x.shape == tuple(out.shape):
        return x
    start, end = 0 if start is None else start, END if end is None else min(end, END)
    bounds = [b.sizes(n) for n in (start, end, dim, step)]
    return b.op("Slice", [x, *bounds], out.shape, out.dtype)


def _part(b: Builder, x: Value, dim: int, start: int, end: int) -> Value:
    shape = list(x.shape)
    shape[dim] = min(end, shape[dim]) - start
    return _slice(b, Like(shape, x.dtype), x, dim, start, end)


@MOVES.translates("aten.select.int")
def _select(b: Builder, out: Tensor, x: Value, dim: int, index: int) -> Value:
    if x.shape[dim] == 1:
        return b.reshape(x, out.shape)
    return b.op("Gather", [x, b.scalar(index, torch.int64)], out.shape, out.dtype, axis=dim)


@MOVES.translates("aten.split.Tensor", "aten.split_with_sizes.default")
def _split(b: Builder, out: Any, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    parts, start = [], 0
    for part in out:
        parts.append(_part(b, x, dim, start, start + part.shape[dim]))
        start += part.shape[dim]
    return parts


@MOVES.translates("aten.unbind.int")
def _unbind(b: Builder, out: Any, x: Value, dim: int = 0) -> list[Value]:
    return [_select(b, part, x, dim, index) for index, part in enumerate(out)]


@MOVES.translates("aten.cat.default")
def _cat(b: Builder, out: Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    there = [b.cast(part, out.dtype) for part in parts if math.prod(part.shape)]
    if len(there) == 1:
        return there[0]
    return b.op("Concat", there, out.shape, out.dtype, axis=dim)


@MOVES.translates("aten.stack.default")
def _stack(b: Builder, out: Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(out.shape)
    shape = [1 if axis == dim else size for axis, size in enumerate(out.shape)]
    return _cat(b, out, [b.reshape(part, shape) for part in parts], dim)


@MOVES.translates("aten.constant_pad_nd.default")
def _pad(b: Builder, out: Tensor, x: Value, widths: Sequence[int], value: float = 0) -> Value:
    axes = len(x.shape)
    before, after = [0] * axes, [0] * axes
    for index in range(len(widths) // 2):
        before[axes - 1 - index], after[axes - 1 - index] = widths[2 * index : 2 * index + 2]
    for axis in range(axes):
        cut = max(-before[axis], 0), x.shape[axis] - max(-after[axis], 0)
        x = _part(b, x, axis, *cut)
    pads = [max(width, 0) for width in (*before, *after)]
    if not any(pads):
        return x
    return b.op("Pad", [x, b.sizes(*pads), b.scalar(value, x.dtype)], out.shape, out.dtype)


@MOVES.translates("aten.flip.default")
def _flip(b: Builder, out: Tensor, x: Value, dims: Sequence[int]) -> Value:
    ones = [-1] * len(dims)
    bounds = [b.sizes(*values) for values in (ones, [-END] * len(dims), dims, ones)]
    return b.op("Slice", [x, *bounds], out.shape, out.dtype)


@MOVES.translates("aten.roll.default")
def _roll(b: Builder, out: Tensor, x: Value, shifts: Any, dims: Any = (0,)) -> Value:
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    for shift, dim in zip(shifts, dims, strict=True):
        at = -shift % x.shape[dim]
        parts = [_part(b, x, dim, at, END), _part(b, x, dim, 0, at)]
        x = _cat(b, out, parts, dim)
    return x


@MOVES.translates("aten.unfold.default")
def _unfold(b: Builder, out: Tensor, x: Value, dim: int, size: int, step: int) -> Value:
    dim %= len(x.shape)
    num, within = out.shape[dim], torch.arange(size)
    shape = (*x.shape[:dim], num, size, *x.shape[dim + 1 :])
    found = b.op("Gather", [x, _windows(b, num, step, within)], shape, out.dtype, axis=dim)
    order = [axis for axis in range(len(shape)) if axis != dim + 1]
    return permute(b, out, found, [*order, dim + 1])


def _windows(b: Builder, num: int, step: int, within: Tensor) -> Value:
    """Return the places of `num` windows, each `step` after the one before."""
    if isinstance(num, int):
        return b.known(torch.arange(num)[:, None] * step + within)
    first = b.op("Mul", [b.arange(num), b.scalar(step, torch.int64)], (num,), torch.int64)
    shape = (num, len(within))
    return b.op("Add", [b.reshape(first, (num, 1)), b.known(within)], shape, torch.int64)


@MOVES.translates("aten.embedding.default")
def _embedding(b: Builder, out: Tensor, table: Value, ids: Value, *_: Any) -> Value:
    return b.op("Gather", [table, ids], out.shape, out.dtype, axis=0)


@MOVES.translates("aten.diagonal.default")
def _diagonal(
    b: Builder, out: Tensor, x: Value, offset: int = 0, first: int = 0, second: int = 1
) -> Value:
    first, second, size = first % len(x.shape), second % len(x.shape), x.shape[first]
    if offset or x.shape[second] != size:
        raise NotImplementedError("a diagonal that is not that of square matrices")
    order = [axis for axis in range(len(x.shape)) if axis not in (first, second)]
    order += [first, second]
    shape = [x.shape[axis] for axis in order]
    x = permute(b, Like(shape, x.dtype), x, order)
    x = b.reshape(x, (*shape[:-2], size * size))
    bounds = [b.sizes(number) for number in (0, size * size, -1, size + 1)]
    return b.op("Slice", [x, *bounds], out.shape, out.dtype)


@MOVES.translates("aten.tril.default", "aten.triu.default")
def _tril(b: Builder, out: Tensor, x: Value, diagonal: int = 0, *, upper: int = 0) -> Value:
    at = b.scalar(diagonal, torch.int64)
    return b.op("Trilu", [x, at], out.shape, out.dtype, upper=upper)


MOVES["aten.triu.default"] = lambda *args: _tril(*args, upper=1)


@MOVES.translates("aten.where.self")
def _where(b: Builder, out: Tensor, condition: Value, x: Value, y: Value) -> Value:
    parts = [condition, operand(b, x, out.dtype), operand(b, y, out.dtype)]
    return b.op("Where", parts, out.shape, out.dtype)


@MOVES.translates("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(b: Builder, out: Tensor, x: Value, mask: Value, value: Any) -> Value:
    return b.op("Where", [mask, operand(b, value, out.dtype), x], out.shape, out.dtype)


@MOVES.translates("aten.logcumsumexp.default")
def _log_cum_sum_exp(b: Builder, out: Tensor, x: Value, dim: int) -> Value:
    """Translate it as a scan in log2(T) steps; each adds what stands a power of two earlier."""
    shift, size = 1, x.shape[dim]
    meta = Like(x.shape, x.dtype)
    while shift < size:
        before = [0] * len(x.shape)
        before[dim] = shift
        pads = b.sizes(*before, *[0] * len(x.shape))
        earlier = _part(b, x, dim, 0, size - shift)
        # Not minus infinity: its difference to itself is not a number.
        least = b.scalar(torch.finfo(x.dtype).min / 2, x.dtype)
        earlier = b.op("Pad", [earlier, pads, least], x.shape, x.dtype)
        x, shift = log_add_exp(b, meta, x, earlier), 2 * shift
    return x
