"""PyTorch modules as ONNX models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hw_profiles.backends.onnx_runtime.builder import CONTRIB, OPSET, Builder, Value, element_type
from hw_profiles.backends.onnx_runtime.capture import capturing, program_of
from hw_profiles.backends.onnx_runtime.maths import MATHS
from hw_profiles.backends.onnx_runtime.moves import MOVES
from hw_profiles.backends.onnx_runtime.places import PLACES
from hw_profiles.backends.onnx_runtime.products import PRODUCTS
from hw_profiles.backends.onnx_runtime.translations import Handler
from hw_profiles.workload import Workload

IR_VERSION = 10
HANDLERS = {**MATHS, **PRODUCTS, **MOVES, **PLACES}
SHAPED = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
"""Operators that take only the shape and dtype of their input."""
PLACED = ("memory_format", "layout", "device", "pin_memory", "non_blocking")
"""Arguments that say where and how a result is stored."""


@dataclass
class Exported:
    """A model and what to bind to it.

    Args:
        model: the serialised model.
        inputs: its inputs with the tensors they start from.
        outputs: its outputs with tensors to write to, the module's result first. One that only
            writes a few places of an input, such as a cache, has that input's tensor.
    """

    model: bytes
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def export(module: nn.Module, inputs: Tensor, workload: Workload) -> Exported:
    """Return what a module does with a workload, as an ONNX model.

    Args:
        module: a packed sub-block or network.
        inputs: of the workload's shape.
        workload: see `program_of`.

    Raises:
        NotImplementedError: naming an operator that has no translation.
    """
    # In inference mode PyTorch would not take its larger operators apart.
    with torch.inference_mode(False), torch.no_grad():
        program = program_of(module, inputs.clone(), workload)
        recorder = Recorder(program.inputs)
        with capturing(), recorder:
            outputs = program.run(*program.inputs)
        return recorder.finish(program.inputs, outputs)


class Recorder(TorchDispatchMode):
    """Runs PyTorch's operators, and translates each whose result depends on an input.

    `torch.onnx.export` does the same in three passes, the last by a generic table, and takes ten
    times as long: too long for a table of hundreds of sub-blocks.
    """

    def __init__(self, inputs: list[Tensor], builder: Builder | None = None) -> None:
        super().__init__()
        self.builder = builder or Builder()
        self.handlers: Mapping[str, Handler] = HANDLERS
        self.inputs: list[Value] = []
        # By identity; the tensors are held, so that no other one can take the place of one.
        self.values: dict[int, tuple[Tensor, Value]] = {}
        for index, tensor in enumerate(inputs):
            self.inputs.append(Value(tuple(tensor.shape), tensor.dtype, f"input{index}"))
            self.values[id(tensor)] = tensor, self.inputs[-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found: list[Value] = []

        def value_of(tensor: Tensor) -> Value:
            found.append(self.value(tensor))
            return found[-1]

        name, kwargs = str(func), kwargs or {}
        inputs = tree_map_only(Tensor, value_of, (args, kwargs))
        result = func(*args, **kwargs)
        known = all(value.tensor is not None for value in found)
        if not known and name.split(".")[1] not in SHAPED:
            self._translate(name, result, *inputs)
        elif "_." in name:
            # It wrote to a constant, of which the values so far may have been read.
            self.values[id(result)] = result, self.builder.known(result.clone())
        return result

    def value(self, tensor: Tensor) -> Value:
        """Return the value of a tensor: a constant, unless it was computed from an input."""
        if id(tensor) not in self.values:
            self.values[id(tensor)] = tensor, self.builder.known(tensor)
        return self.values[id(tensor)][1]

    def _translate(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        # One that writes to its argument gives it a new value: results are kept by identity.
        functional = name.replace("_.", ".")
        if functional not in self.handlers:
            raise NotImplementedError(f"the operator {name}")
        kept = {key: value for key, value in kwargs.items() if key not in PLACED}
        values = self.handlers[functional](self.builder, result, *args, **kept)
        if isinstance(result, Tensor):
            result, values = [result], [values]
        # Only backward passes read the further results of attention and norms.
        for tensor, value in zip(result, values, strict=False):
            self.values[id(tensor)] = tensor, value

    def finish(self, inputs: list[Tensor], outputs: list[Tensor]) -> Exported:
        """Return the model of all that was recorded."""
        starts = dict(zip((value.name for value in self.inputs), inputs, strict=True))
        values, bound = [], {}
        for tensor in outputs:
            value = self.value(tensor)
            if value in self.inputs:
                continue  # a part of the state that stays as it is
            value = self.builder.own(value)
            values.append(value)
            before = self.builder.written.get(value)
            if before is not None and before in self.inputs:
                bound[value.name] = starts[before.name]
            else:
                dtype = torch.float32 if value.dtype == torch.bfloat16 else value.dtype
                bound[value.name] = torch.empty(value.shape, dtype=dtype)
        return Exported(_model(self.builder, self.inputs, values), starts, bound)


def matrix_product(left: Tensor, right: Tensor) -> Exported:
    """Return a model that multiplies two matrices, of which the second one is constant."""
    builder = Builder()
    given = Value(tuple(left.shape), left.dtype, "input0")
    shape = (left.shape[0], right.shape[1])
    product = builder.op("MatMul", [given, builder.known(right)], shape, left.dtype)
    model = _model(builder, [given], [product])
    return Exported(model, {given.name: left}, {product.name: torch.empty(shape)})


def _model(builder: Builder, inputs: list[Value], outputs: list[Value]) -> bytes:
    from onnx import helper

    nodes = builder.needed(outputs)
    read = {name for node in nodes for name in node.input}
    constants = [array for array, _ in builder.constants if array.name in read]
    taken, given = ([_info(value) for value in values] for values in (inputs, outputs))
    graph = helper.make_graph(nodes, "module", taken, given, constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def _info(value: Value) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(value.name, element_type(value.dtype), value.shape)
