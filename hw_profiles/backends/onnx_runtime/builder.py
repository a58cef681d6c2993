"""An ONNX graph in the making: tensors that are known, tensors that are computed, and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPSET = 20
CONTRIB = "com.microsoft"
SMALL = 64
"""Constants with at most this many elements are shared."""


class Like(NamedTuple):
    """Shape and dtype of a result, in the place of one that PyTorch computed."""

    shape: Sequence[int]
    dtype: torch.dtype


@dataclass(eq=False)
class Value:
    """A tensor of the graph.

    Args:
        shape: its shape.
        dtype: its dtype in PyTorch; bf16 stands for fp32, which is what ONNX Runtime computes in.
        name: its name in the graph; empty until it is needed there.
        tensor: its value, where that does not depend on any input.
        source: the computed tensor of another shape that it is a view of.
        viewed: the value it was made a view of, which may be a view itself.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""
    tensor: Tensor | None = None
    source: Value | None = None
    viewed: Value | None = None


@dataclass
class Builder:
    """Collects nodes and constants."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    written: dict[Value, Value] = field(default_factory=dict)
    """The tensor that the result is a copy of but for a few places, by the result."""
    values: dict[Any, Value] = field(default_factory=dict)
    """Values to use again."""
    _made: dict[Value, tuple[str, list[Any]]] = field(default_factory=dict)
    _named: dict[Any, str] = field(default_factory=dict)
    _outputs: set[Value] = field(default_factory=set)
    _count: int = 0

    def fresh(self) -> str:
        """Return a name that is not taken."""
        self._count += 1
        return f"v{self._count}"

    def known(self, tensor: Tensor) -> Value:
        """Return a constant."""
        return Value(tuple(tensor.shape), tensor.dtype, tensor=tensor)

    def scalar(self, value: float | bool, dtype: torch.dtype) -> Value:
        """Return a constant without axes."""
        return self.known(torch.tensor(value, dtype=dtype))

    def own(self, value: Value) -> Value:
        """Return a value that is computed, under a name of its own: an output of the graph."""
        if value.tensor is None and value.source is None and value not in self._outputs:
            self._outputs.add(value)
            return value
        return self.op("Identity", [value], value.shape, value.dtype)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Value:
        """Return a constant filled with one number."""
        return self.known(torch.full(tuple(shape), value, dtype=dtype))

    def arange(self, end: int) -> Value:
        """Return the whole numbers below `end`, int64."""
        return self.known(torch.arange(end))

    def view_sizes(self, value: Value) -> Value:
        """Return what a view's source is reshaped to."""
        return self.sizes(*value.shape)

    def sizes(self, *values: int) -> Value:
        """Return a constant int64 vector, as shapes and axes are given."""
        return self.known(torch.tensor(values, dtype=torch.int64))

    def op(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        shape: Sequence[int],
        dtype: torch.dtype,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Add a node with one result of this shape and dtype, and return the result."""
        from onnx import helper

        value = Value(tuple(shape), dtype, self.fresh())
        names = ["" if item is None else self.use(item) for item in inputs]
        while not names[-1]:
            names.pop()  # fusions of ONNX Runtime crash on absent inputs that are spelled out
        self.nodes.append(helper.make_node(kind, names, [value.name], domain=domain, **attributes))
        self._made[value] = kind, list(inputs)
        return value

    def made_by(self, value: Value, kind: str) -> list[Any] | None:
        """Return the inputs of the node that made a value, if it is of this kind."""
        made, inputs = self._made.get(value, ("", []))
        return inputs if made == kind else None

    def use(self, value: Value) -> str:
        """Return the name of a value, which from now on is in the graph."""
        if value.name:
            return value.name
        if value.source is not None:
            inputs = [value.source, self.view_sizes(value)]
            made = self.op("Reshape", inputs, value.shape, value.dtype)
            value.name = made.name
        else:
            value.name = self._constant(value)
        return value.name

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Return a view of another shape; views of views cost nothing."""
        base, wanted = value.source or value, tuple(shape)
        if wanted == value.shape:
            return value
        if wanted == base.shape:
            return base
        if base.tensor is not None:
            return self.known(base.tensor.reshape(wanted))
        return Value(wanted, value.dtype, source=base, viewed=value)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Return the value in another dtype."""
        if value.tensor is not None:
            return self.known(value.tensor.to(dtype))
        if element_type(value.dtype) == element_type(dtype):
            return value
        return self.op("Cast", [value], value.shape, dtype, to=element_type(dtype))

    def needed(self, outputs: Sequence[Value]) -> list[Any]:
        """Return the nodes that outputs depend on; ONNX Runtime would run the others too."""
        wanted, nodes = {value.name for value in outputs}, []
        for node in reversed(self.nodes):
            if node.output[0] in wanted:
                wanted.update(node.input)
                nodes.append(node)
        return nodes[::-1]

    def _constant(self, value: Value) -> str:
        from onnx import numpy_helper

        assert value.tensor is not None
        tensor = value.tensor.detach()
        tensor = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous()
        key = (
            (tensor.dtype, value.shape, tuple(tensor.flatten().tolist()))
            if tensor.numel() <= SMALL
            else (id(value.tensor),)
        )
        if key not in self._named:
            self._named[key] = self.fresh()
            array = numpy_helper.from_array(tensor.numpy(), self._named[key])
            # The tensor stays with the number it is known by.
            self.constants.append((array, value.tensor))
        return self._named[key]


def element_type(dtype: torch.dtype) -> int:
    """Return the number ONNX has for a dtype."""
    from onnx import TensorProto

    names = {
        torch.float32: "FLOAT",
        torch.bfloat16: "FLOAT",
        torch.float64: "DOUBLE",
        torch.int64: "INT64",
        torch.int32: "INT32",
        torch.int8: "INT8",
        torch.uint8: "UINT8",
        torch.float8_e4m3fn: "FLOAT8E4M3FN",
        torch.bool: "BOOL",
    }
    return int(getattr(TensorProto, names[dtype]))
