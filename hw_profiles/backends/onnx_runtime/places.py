"""PyTorch's operators that read and write some places of a tensor, as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Builder, Like, Value
from hw_profiles.backends.onnx_runtime.moves import expand, permute
from hw_profiles.backends.onnx_runtime.translations import Table

PLACES = Table()


@PLACES.translates("aten.slice_scatter.default")
def _slice_scatter(
    b: Builder, out: Tensor, x: Value, new: Value, dim: int = 0, start: Any = None,
    end: Any = None, step: int = 1,
) -> Value:  # fmt: skip
    if x.shape == new.shape:
        return b.cast(new, out.dtype)
    places = torch.arange(x.shape[dim])[slice(start, end, step)]
    return _scatter(b, out, x, new, dim, places)


@PLACES.translates("aten.select_scatter.default")
def _select_scatter(b: Builder, out: Tensor, x: Value, new: Value, dim: int, index: int) -> Value:
    dim %= len(x.shape)
    shape = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    places = torch.tensor([index % x.shape[dim]])
    return _scatter(b, out, x, b.reshape(new, shape), dim, places)


def _scatter(
    b: Builder, out: Tensor | Like, x: Value, new: Value, dim: int, places: Tensor
) -> Value:
    dim %= len(x.shape)
    along = [-1 if axis == dim else 1 for axis in range(len(new.shape))]
    index = b.known(places.reshape(along).expand(new.shape).contiguous())
    written = b.op("ScatterElements", [x, index, new], out.shape, out.dtype, axis=dim)
    b.written[written] = x
    return written


@PLACES.translates("aten.index.Tensor")
def _index(b: Builder, out: Tensor, x: Value, indices: Sequence[Value | None]) -> Value:
    given = {axis: index for axis, index in enumerate(indices) if index is not None}
    if len(given) == 1 and next(iter(given.values())).dtype != torch.bool:
        ((axis, index),) = given.items()
        return b.op("Gather", [x, index], out.shape, out.dtype, axis=axis)
    axes, places = _places(x, indices)
    rows, _ = _rows(b, x, axes)
    shape = (len(places), *rows.shape[1:])
    found = b.op("Gather", [rows, b.known(places)], shape, out.dtype, axis=0)
    return permute(b, out, found, _order(axes, len(shape)))


@PLACES.translates("aten.index_put.default")
def _index_put(
    b: Builder, out: Tensor, x: Value, indices: Sequence[Value | None], new: Value
) -> Value:
    axes, places = _places(x, indices)
    rows, order = _rows(b, x, axes)
    shape = (len(places), *rows.shape[1:])
    wanted = [shape[axis] for axis in _order(axes, len(shape))]
    new = expand(b, Like(wanted, out.dtype), new)
    back = _inverse(_order(axes, len(shape)))
    new = permute(b, Like(shape, out.dtype), new, back)
    meta = Like(rows.shape, out.dtype)
    written = _scatter(b, meta, rows, new, 0, places)
    whole = b.reshape(written, [x.shape[axis] for axis in order])
    return permute(b, out, whole, _inverse(order))


def _places(x: Value, indices: Sequence[Value | None]) -> tuple[list[int], Tensor]:
    """Return the axes that are indexed, and which of their elements, counted in row order.

    Raises:
        NotImplementedError: unless they are vectors, or one mask, that depend on no input.
    """
    axes: list[int] = []
    vectors: list[Tensor] = []
    for axis, index in enumerate(indices):
        if index is None:
            continue
        if index.tensor is None:
            raise NotImplementedError("indexing by several tensors that depend on the input")
        masked = index.tensor.dtype == torch.bool
        found = index.tensor.nonzero(as_tuple=True) if masked else (index.tensor,)
        axes += range(axis, axis + len(found))
        vectors += found
    if any(vector.ndim != 1 for vector in vectors):
        raise NotImplementedError("indexing by several tensors that are not vectors")
    places = torch.zeros(1, dtype=torch.int64)
    for axis, vector in zip(axes, vectors, strict=True):
        places = places * x.shape[axis] + vector % x.shape[axis]
    return axes, places


def _rows(b: Builder, x: Value, axes: Sequence[int]) -> tuple[Value, list[int]]:
    """Return the tensor with some axes in front and merged, and the order its axes then have."""
    order = [*axes, *(axis for axis in range(len(x.shape)) if axis not in axes)]
    shape = [x.shape[axis] for axis in order]
    moved = permute(b, Like(shape, x.dtype), x, order)
    merged = math.prod(shape[: len(axes)])
    return b.reshape(moved, (merged, *shape[len(axes) :])), order


def _order(axes: Sequence[int], num_axes: int) -> list[int]:
    """Return the order that brings the indexed axis from the front to where PyTorch puts it."""
    adjacent = list(axes) == list(range(axes[0], axes[0] + len(axes)))
    order = list(range(1, num_axes))
    order.insert(axes[0] if adjacent else 0, 0)
    return order


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(axis) for axis in range(len(order))]
