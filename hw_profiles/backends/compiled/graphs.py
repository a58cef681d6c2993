"""Capturing a module with its state as one graph of tensors in, tensors out.

Compilers want a function without side effects on Python objects: the state's tensors become inputs,
its number of tokens a constant, and what a step makes of the state further outputs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from hw_profiles.backends.base import state_parts
from hw_profiles.backends.eager import runner
from hw_profiles.workload import Workload

FP32_BYTES = 4


def capture(
    module: nn.Module, inputs: Tensor, workload: Workload
) -> tuple[GraphModule, list[Tensor]]:
    """Return one pass of a workload as a graph, and the tensors to call it with.

    The graph returns the module's output and then the tensors of the state that were replaced;
    those that are written in place are inputs. Weights are constants of the graph, low-bit ones
    further inputs, to keep an optimiser from computing with them: Inductor would store them widened
    to fp32, taking the bytes they were to save, and where it recognises an int8 linear map it takes
    oneDNN's, which at one token was seen to run a reference kernel (2.8 ms where eager takes 0.1;
    a plain `torch.compile` with freezing does that).

    Args:
        module: a packed sub-block or `Subnet` in evaluation mode.
        inputs: see `Backend.prepare`.
        workload: what to run.

    Raises:
        Exception: of any kind, where the module cannot be traced.
    """
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Layouts that kernels keep are made at the first call; the graph takes them as they are.
        runner(module, inputs, workload)()
        step = _Pass(module, workload)
        arguments = [inputs, *step.state_tensors()]
        # Where it fails it prints the whole graph.
        with contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(step.eval(), tuple(arguments), strict=False)
        traced: GraphModule = program.module(check_guards=False)
    # Plain arguments; taking nested ones apart costs microseconds at every call.
    traced.graph.set_codegen(CodeGen())
    arguments += _low_bit_weights_to_inputs(traced)
    # A module of its own: the traced one still checks that it gets nested arguments.
    return GraphModule(traced, traced.graph), arguments


class _Pass(nn.Module):
    """One pass of a workload as a function of tensors."""

    def __init__(self, module: Any, workload: Workload) -> None:
        super().__init__()
        self.module = module
        self.context = workload.tokens
        self.state: Any = None
        if workload.phase == "decode":
            self.state = module.init_state(workload.batch, workload.max_tokens)

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors of a state, in the order `forward` takes them."""
        return [getattr(part, name) for part, name in _places(self.state)]

    def forward(self, inputs: Tensor, *state_tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the output and the tensors that replace parts of the state."""
        if self.state is None:
            return (self.module(inputs),)
        state = _copied(self.state, self.context)
        for (part, name), tensor in zip(_places(state), state_tensors, strict=True):
            setattr(part, name, tensor)
        out = self.module(inputs, state)
        after = [getattr(part, name) for part, name in _places(state)]
        replaced = [new for new, old in zip(after, state_tensors, strict=True) if new is not old]
        return (out, *replaced)


def _places(state: Any) -> list[tuple[Any, str]]:
    """Return where a state's tensors are: the part and the field's name."""
    return [
        (part, field.name)
        for part in state_parts(state)
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), Tensor)
    ]


def _copied(state: Any, length: int) -> Any:
    """Return a state of the same tensors that has seen `length` tokens."""
    copies = [copy.copy(part) for part in state] if isinstance(state, list) else copy.copy(state)
    for part in state_parts(copies):
        part.length = length
    return copies


def _low_bit_weights_to_inputs(graph: GraphModule) -> list[Tensor]:
    """Turn weights below fp32 into inputs, after those there are; returns them in order."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    weights: list[Tensor] = []
    for node in _constants(graph):
        value = _value(graph, str(node.target))
        if value.dim() < 2 or value.element_size() >= FP32_BYTES:
            continue
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"stored_{len(weights)}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
        weights.append(value)
    return weights


def _constants(graph: GraphModule) -> Sequence[Node]:
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    return [node for node in nodes if isinstance(_value(graph, str(node.target)), Tensor)]


def _value(graph: GraphModule, target: str) -> Any:
    value: Any = graph
    for name in target.split("."):
        value = getattr(value, name)
    return value
