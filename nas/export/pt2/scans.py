"""Recurrences as `scan`, PyTorch's own loop over tensors, so that a program needs no other package.

Shapes: B batch, G key/value heads, N chunks of C tokens, K key width, V value width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from nas_kernels.recurrence import LOG_SUM, MAX, SUM

Step = Callable[..., list[Tensor]]
"""Maps the state and what one step is given to the next state and all that is kept of it."""


def add_scans(program: ExportedProgram) -> None:
    """Replace every operator of `nas_kernels.recurrence` in a program by a `scan`."""
    module, operators = program.graph_module, torch.ops.hwnas
    for node in list(module.graph.nodes):
        if node.target is operators.recurrence.default:
            kind, factor, added, start, dim = node.args
            editor = _Editor(module, node)
            factors = editor.call(torch.ops.aten.expand_as.default, factor, added)
            factors = editor.call(torch.ops.aten.contiguous.default, factors)
            (kept,) = editor.scan(STEPS[kind], start, (factors, added), dim)
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
        elif node.target is operators.delta_states.default:
            *given, start = node.args
            results = _Editor(module, node).scan(_write_differences, start, given, 2)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
            module.graph.erase_node(node)
    module.recompile()


# Every step returns the state twice, handed on and kept, of which one must be a copy.
def _add(state: Tensor, factor: Tensor, added: Tensor) -> list[Tensor]:
    after = torch.addcmul(added, factor, state)
    return [after, after.clone()]


def _take_larger(state: Tensor, factor: Tensor, added: Tensor) -> list[Tensor]:
    after = torch.maximum(state + factor, added)
    return [after, after.clone()]


def _add_logarithms(state: Tensor, factor: Tensor, added: Tensor) -> list[Tensor]:
    after = torch.logaddexp(state + factor, added)
    return [after, after.clone()]


def _write_differences(
    state_BGKV: Tensor, keys_BGKC: Tensor, corrections_BGCK: Tensor, values_BGCV: Tensor
) -> list[Tensor]:
    written_BGCV = values_BGCV - corrections_BGCK @ state_BGKV
    after_BGKV = state_BGKV + keys_BGKC @ written_BGCV
    return [after_BGKV, after_BGKV.clone(), written_BGCV]


STEPS: dict[Any, Step] = {SUM: _add, MAX: _take_larger, LOG_SUM: _add_logarithms}


class _Editor:
    """Puts nodes in front of another one, each with a tensor without values that stands for it."""

    def __init__(self, module: GraphModule, before: Node) -> None:
        self.module = module
        self.before = before

    def call(self, target: Any, *args: Any) -> Node:
        """Add a call of an operator and return its node."""
        values = torch.fx.map_arg(args, lambda node: node.meta["val"])
        return self._add(target, args, target(*values))

    def scan(self, step: Step, start: Node, given: Sequence[Node], dim: int) -> list[Node]:
        """Add a loop along an axis; returns what it keeps, along the same axis."""
        moved = [self.call(torch.ops.aten.movedim.int, node, dim, 0) for node in given]
        values = [start.meta["val"], *(node.meta["val"][0] for node in moved)]
        body = make_fx(step)(*values)
        name = f"step_{sum('step_' in name for name, _ in self.module.named_children())}"
        self.module.add_module(name, body)
        with self.module.graph.inserting_before(self.before):
            attribute = self.module.graph.get_attr(name)
        last, *kept = step(*values)
        num_steps = moved[0].meta["val"].shape[0]
        stacked = [value.new_empty((num_steps, *value.shape)) for value in kept]
        loop = self._add(
            torch.ops.higher_order.scan, (attribute, [start], moved, ()), (last, *stacked)
        )
        parts = [self.call(operator.getitem, loop, place + 1) for place in range(len(kept))]
        return [self.call(torch.ops.aten.movedim.int, part, 0, dim) for part in parts]

    def _add(self, target: Any, args: Any, value: Any) -> Node:
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(target, args)
        node.meta["val"] = value
        return node
