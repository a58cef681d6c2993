"""An ONNX graph whose sizes are found when it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from hw_profiles.backends.onnx_runtime.builder import SMALL, Builder, Value

COMPARED = 1 << 20
"""Constants with at most this many elements are stored once if they are equal."""
FUNCTIONS = {
    "Add": "Add",
    "Mul": "Mul",
    "Mod": "Mod",
    "PythonMod": "Mod",
    "CleanDiv": "Div",
    "Max": "Max",
    "Min": "Min",
    "FloorDiv": "Div",
    "ToFloat": "",
}
"""Operators by the names that PyTorch gives functions of sizes; none where nothing is to be done.
"""


class FreeBuilder(Builder):
    """Collects nodes; sizes may be expressions of free ones, and equal nodes are made once.

    Args:
        int8_tables: whether tables that rows are looked up in are rounded to int8.
    """

    def __init__(self, int8_tables: bool = False) -> None:
        super().__init__()
        self.int8_tables = int8_tables
        self.roots: dict[str, Value] = {}
        """Free sizes, (1,) int64, by the symbols they have in expressions."""
        self.captured: dict[str, list[str]] = {}
        """What a node's inner graph reads beside its inputs, by the node's first output."""
        self._equal: dict[Any, Value] = {}
        self._by_content: dict[Any, torch.Tensor] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        shape: Sequence[int],
        dtype: torch.dtype,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Add a node, or return the result of an equal one; see `Builder.op`."""
        names = tuple("" if item is None else self.use(item) for item in inputs)
        key = kind, names, domain, repr(sorted(attributes.items()))
        if kind == "Identity":
            return super().op(kind, inputs, shape, dtype, domain, **attributes)
        if key not in self._equal:
            self._equal[key] = super().op(kind, inputs, shape, dtype, domain, **attributes)
        return self._equal[key]

    def known(self, tensor: torch.Tensor) -> Value:
        """Return a constant; equal ones share their storage."""
        if SMALL < tensor.numel() <= COMPARED:
            data = tensor.detach().contiguous()
            raw = data.view(torch.uint8) if data.ndim else data.reshape(1).view(torch.uint8)
            digest = hashlib.sha256(raw.numpy().tobytes()).digest()
            key = data.dtype, tuple(data.shape), digest
            tensor = self._by_content.setdefault(key, tensor)
        return super().known(tensor)

    def sizes(self, *values: int) -> Value:
        """Return an int64 vector, of which some numbers are found when the graph runs."""
        if all(isinstance(value, int) for value in values):
            return super().sizes(*values)
        parts: list[Value] = []
        run: list[int] = []
        for value in values:
            if isinstance(value, int):
                run.append(value)
                continue
            if run:
                parts.append(super().sizes(*run))
            run = []
            parts.append(self.size(_expression(value)))
        if run:
            parts.append(super().sizes(*run))
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", parts, (len(values),), torch.int64, axis=0)

    def scalar(self, value: Any, dtype: torch.dtype) -> Value:
        """Return a number without axes."""
        if isinstance(value, bool | int | float):
            return super().scalar(value, dtype)
        found = self.size(_expression(value))
        return self.cast(self.reshape(found, ()), dtype)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Value:
        """Return a tensor filled with one number."""
        constant = isinstance(value, bool | int | float)
        if constant and all(isinstance(size, int) for size in shape):
            return super().full(shape, value, dtype)
        return self.op("Expand", [self.scalar(value, dtype), self.sizes(*shape)], shape, dtype)

    def arange(self, end: int) -> Value:
        """Return the whole numbers below `end`, int64."""
        if isinstance(end, int):
            return super().arange(end)
        bounds = [self.scalar(number, torch.int64) for number in (0, end, 1)]
        return self.op("Range", bounds, (end,), torch.int64)

    def view_sizes(self, value: Value) -> Value:
        """Return what a view's source is reshaped to, with as little arithmetic as there can be.

        0 stands for the source's size on that axis, -1 for what is left over.
        """
        assert value.source is not None
        before = value.source.shape
        wanted: list[int] = []
        open_axes: list[int] = []
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                same = axis < len(before) and _expression(size) == _expression(before[axis])
                if not same:
                    open_axes.append(axis)
                size = 0 if same else size
            wanted.append(size)
        if open_axes:
            longest = max(open_axes, key=lambda axis: len(str(_expression(wanted[axis]))))
            wanted[longest] = -1
        return self.sizes(*wanted)

    def size(self, expression: sympy.Expr) -> Value:
        """Return the value (1,) of an expression of free sizes.

        Raises:
            NotImplementedError: for a function of sizes that is not known.
        """
        if expression.is_Integer:
            return super().sizes(int(expression))
        if expression.is_Symbol:
            return self.roots[str(expression)]
        name = type(expression).__name__
        if name not in FUNCTIONS:
            raise NotImplementedError(f"a size that is {expression}")
        found, *others = (self.size(argument) for argument in expression.args)
        if not FUNCTIONS[name]:
            return found
        if name == "FloorDiv":
            if not expression.args[0].is_nonnegative:
                # The operator rounds towards zero.
                rest = self.op("Mod", [found, *others], (1,), torch.int64)
                found = self.op("Sub", [found, rest], (1,), torch.int64)
            return self.op("Div", [found, *others], (1,), torch.int64)
        for other in others:
            found = self.op(FUNCTIONS[name], [found, other], (1,), torch.int64)
        return found

    def needed(self, outputs: Sequence[Value]) -> list[Any]:
        """Return the nodes that outputs depend on; see `Builder.needed`."""
        wanted, nodes = {value.name for value in outputs}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                wanted.update(self.captured.get(node.output[0], ()))
                nodes.append(node)
        return nodes[::-1]


def _expression(size: Any) -> Any:
    """Return the sympy expression of a size."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def dim_of(size: int | torch.SymInt) -> int | str:
    """Return a size as the dimension of an input or output is described."""
    return size if isinstance(size, int) else str(_expression(size))
