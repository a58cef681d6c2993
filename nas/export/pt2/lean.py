"""Programs without what they need not compute: once in place of many times, and no assertions.

An operator looks tables up that it has made before, such as those of rotary positions; recorded, it
makes them anew, and so does every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

ASSERTIONS = ("aten._assert_tensor_metadata.default",)
CASTS = ("aten.to.dtype", "aten._to_copy.default")


def lean(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes the same with fewer operators.

    Args:
        program: just recorded; it may be changed. Operators for which PyTorch has a kernel of its
            own stay whole.
    """
    # Without operators that write into their arguments, equal calls have equal results.
    program = program.run_decompositions({})
    graph = program.graph_module.graph
    # Results are known by the names of their nodes.
    results = set(graph.output_node().all_input_nodes)
    for node in [node for node in graph.nodes if node not in results]:
        if str(node.target) in ASSERTIONS:
            graph.erase_node(node)
        elif str(node.target) in CASTS and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _merge_equal(program.graph_module, results)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _changes_nothing(node: Node) -> bool:
    """Whether a cast is to the type that there is already."""
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _merge_equal(module: GraphModule, kept: set[Node]) -> None:
    """Let all calls of one operator with the same arguments, but those kept, be the first one."""
    first: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        known = first.setdefault(key, node)
        if known is not node and node not in kept:
            node.replace_all_uses_with(known)
            module.graph.erase_node(node)


def _hashable(value: Any) -> Any:
    """Return what is equal for equal arguments; a number is another one as a float."""
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((name, _hashable(item)) for name, item in value.items()))
    return type(value), value
