"""Recurrences over time as ONNX `Scan` nodes.

Shapes: B batch, G key/value heads, N chunks of C tokens, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Builder, Value, element_type
from hw_profiles.backends.onnx_runtime.translations import Table
from nas.export.onnx.builder import FreeBuilder
from nas_kernels.recurrence import MAX, SUM

LOOPS = Table()
Step = tuple[str, tuple[str, ...], str]
"""Operator, names of its inputs, name of its result."""


def scan(
    b: FreeBuilder,
    start: Value,
    steps: Sequence[Step],
    read: dict[str, Value],
    outputs: dict[str, Value],
    dim: int,
    captured: Sequence[Value] = (),
) -> list[Value]:
    """Add a `Scan` over axis `dim`.

    Args:
        b: the graph.
        start: the state before the first step, ``"before"`` in the inner graph.
        steps: nodes of the inner graph; the state after it is ``"after"``.
        read: what is read slice by slice, by the names in the inner graph.
        outputs: names of results in the inner graph that are stacked along `dim`, with the shapes
            and dtypes of the stacks.
        dim: the axis of time.
        captured: values of the outer graph that steps name.
    """
    from onnx import helper

    def described(name: str, dtype: torch.dtype) -> Any:
        return helper.make_tensor_value_info(name, element_type(dtype), None)

    nodes = [helper.make_node(kind, list(inputs), [result]) for kind, inputs, result in steps]
    body = helper.make_graph(
        nodes,
        "step",
        [described("before", start.dtype)] + [described(n, v.dtype) for n, v in read.items()],
        [described("after", start.dtype)] + [described(n, v.dtype) for n, v in outputs.items()],
    )
    for value in outputs.values():
        value.name = b.fresh()
    inputs = [b.use(start), *(b.use(value) for value in read.values())]
    results = [b.fresh(), *(value.name for value in outputs.values())]
    node = helper.make_node(
        "Scan",
        inputs,
        results,
        body=body,
        num_scan_inputs=len(read),
        scan_input_axes=[dim] * len(read),
        scan_output_axes=[dim] * len(outputs),
    )
    b.nodes.append(node)
    b.captured[results[0]] = [b.use(value) for value in captured]
    return list(outputs.values())


@LOOPS.translates("hwnas.recurrence.default")
def _recurrence(
    b: Builder, out: Tensor, kind: str, factor: Value, added: Value, start: Value, dim: int
) -> Value:
    assert isinstance(b, FreeBuilder)
    read, captured = {"added": added}, []
    if factor.shape[dim] == 1:
        shape = [size for axis, size in enumerate(factor.shape) if axis != dim]
        captured = [b.reshape(factor, shape)]
        name = b.use(captured[0])
    else:
        read["factor"], name = factor, "factor"
    made = {"states": Value(tuple(out.shape), out.dtype)}
    (states,) = scan(b, start, _steps(kind, name), read, made, dim, captured)
    return states


def _steps(kind: str, factor: str) -> list[Step]:
    """Return the inner graph of a kind of recurrence; the prefix keeps names apart."""
    keep: Step = ("Identity", ("after",), "states")
    if kind == SUM:
        steps: list[Step] = [
            ("Mul", ("before", factor), "s_kept"),
            ("Add", ("s_kept", "added"), "after"),
        ]
        return [*steps, keep]
    moved: Step = ("Add", ("before", factor), "s_moved")
    if kind == MAX:
        return [moved, ("Max", ("s_moved", "added"), "after"), keep]
    return [
        moved,
        ("Max", ("s_moved", "added"), "s_top"),
        ("Min", ("s_moved", "added"), "s_low"),
        ("Sub", ("s_low", "s_top"), "s_gap"),
        ("Softplus", ("s_gap",), "s_rest"),
        ("Add", ("s_top", "s_rest"), "after"),
        keep,
    ]


@LOOPS.translates("hwnas.delta_states.default")
def _delta_states(
    b: Builder, out: Any, keys: Value, corrections: Value, values: Value, start: Value
) -> list[Value]:
    assert isinstance(b, FreeBuilder)
    states, written = (Value(tuple(part.shape), part.dtype) for part in out)
    steps: list[Step] = [
        ("MatMul", ("corrections", "before"), "s_stored"),
        ("Sub", ("values", "s_stored"), "written"),
        ("MatMul", ("keys", "written"), "s_change"),
        ("Add", ("before", "s_change"), "after"),
        ("Identity", ("after",), "states"),
    ]
    read = {"keys": keys, "corrections": corrections, "values": values}
    return scan(b, start, steps, read, {"states": states, "written": written}, 2)
