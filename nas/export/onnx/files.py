"""Graphs as files: `.onnx` beside one file of weights that all of them read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hw_profiles.backends.onnx_runtime.builder import CONTRIB, OPSET, Value, element_type
from hw_profiles.backends.onnx_runtime.export import IR_VERSION
from nas.export.onnx.graphs import Graph

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

WEIGHTS = "weights.data"
INLINE_BYTES = 1024
"""Constants of fewer bytes stay in the graph's own file."""
PAGE, LINE = 4096, 64
"""Large tensors begin at a page, so that they can be mapped; others at a cache line."""


class WeightFile:
    """Constants of several graphs, each stored once.

    Args:
        file: open for writing, empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def take(self, tensor: TensorProto) -> TensorProto:
        """Return the constant with its values here, if they are many."""
        from onnx import TensorProto

        raw = tensor.raw_data
        if len(raw) < INLINE_BYTES:
            return tensor
        key = hashlib.sha256(raw).digest()
        if key not in self._places:
            step = PAGE if len(raw) >= PAGE else LINE
            self._file.write(bytes(-self._file.tell() % step))
            self._places[key] = self._file.tell()
            self._file.write(raw)
        made = TensorProto(
            name=tensor.name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            data_location=TensorProto.EXTERNAL,
        )
        about = {"location": WEIGHTS, "offset": self._places[key], "length": len(raw)}
        for name, value in about.items():
            made.external_data.add(key=name, value=str(value))
        return made


def write_graphs(graphs: Mapping[str, Graph], folder: Path) -> dict[str, int]:
    """Write graphs by their file names, and check each; returns how many nodes they have."""
    import onnx

    with open(folder / WEIGHTS, "wb") as file:
        weights = WeightFile(file)
        for name, graph in graphs.items():
            (folder / name).write_bytes(model_of(graph, weights).SerializeToString())
    counts = {}
    for name in graphs:
        onnx.checker.check_model(str(folder / name), full_check=False)
        counts[name] = len(onnx.load(folder / name, load_external_data=False).graph.node)
    return counts


def model_of(graph: Graph, weights: WeightFile) -> ModelProto:
    """Return the model of a graph, its larger constants in a file."""
    from onnx import helper

    recorded = graph.recorded
    nodes = recorded.builder.needed(recorded.outputs)
    read = {name for node in nodes for name in node.input}
    read |= {name for names in recorded.builder.captured.values() for name in names}
    constants = [weights.take(a) for a, _ in recorded.builder.constants if a.name in read]
    names = {value.name: name for name, value in zip(graph.outputs, recorded.outputs, strict=True)}
    made = helper.make_graph(
        [_renamed(node, names) for node in nodes],
        "network",
        [_info(v, v.name, graph.inputs[v.name]) for v in recorded.inputs],
        [
            _info(value, name, graph.outputs[name])
            for name, value in zip(graph.outputs, recorded.outputs, strict=True)
        ],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="hwnas"
    )


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """Return the node with results under other names, also where an inner graph reads them."""
    for part in (node.input, node.output):
        for index, name in enumerate(part):
            part[index] = names.get(name, name)
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            _renamed(inner, names)
    return node


def _info(value: Value, name: str, dims: list[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, element_type(value.dtype), dims)
