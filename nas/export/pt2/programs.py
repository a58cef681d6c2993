"""Networks as programs of `torch.export`, for any batch and any number of tokens.

Branches are taken as for large sizes, and the forms this chooses hold for small ones as well (see
`nas.export.onnx.graphs`, which takes them alike). `torch.export` would note each as a bound on the
sizes and refuse the free ones, so it is told not to.

Shapes: B batch, T tokens, P tokens before, S stored tokens, V vocabulary or classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nas.export.onnx.graphs import (
    MANY_TOKENS,
    filled_state,
    state_tensors,
    tokens_hint,
)
from nas.export.onnx.states import growing
from nas.export.pt2.lean import lean
from nas.export.pt2.scans import add_scans
from nas_kernels.recurrence import one_operator_each
from searchspace.ends import Position, example_inputs
from searchspace.subnet import Subnet

BATCH_HINT = 3
PAST_HINTS = (509, 503, 499, 491, 487, 479, 467, 463)
"""Tokens before a decode step that it may be recorded with: primes, no size of anything else."""


@dataclass(frozen=True)
class Bounds:
    """Which sizes a program takes.

    Args:
        batch: the only number of sequences; None for any.
        tokens: largest number of tokens, those before included; None for any.
    """

    batch: int | None = None
    tokens: int | None = None

    @property
    def batch_hint(self) -> int:
        """Sequences that the program is recorded with."""
        return BATCH_HINT if self.batch is None else self.batch

    def batch_sizes(self) -> dict[int, Any]:
        """Return the free size of axis 0, if it is one."""
        return {0: Dim("batch")} if self.batch is None else {}


FREE = Bounds()


@dataclass(frozen=True)
class Decode:
    """A decode step.

    Args:
        program: takes a token (B, 1), the number of tokens before it and the state; returns logits
            and the state.
        state: names of the state's tensors, in order, such as ``"layer0_mixer.k"``.
    """

    program: ExportedProgram
    state: list[str]


def whole_program(subnet: Subnet, bounds: Bounds = FREE) -> ExportedProgram:
    """Return an encoder's or ViT's program: inputs to logits (B, V)."""
    tokens = _tokens_hint(subnet, bounds)
    inputs = example_inputs(subnet.arch.ends, bounds.batch_hint, tokens)
    sizes = bounds.batch_sizes()
    if subnet.arch.family.kind == "encoder":
        sizes[1] = Dim("tokens", max=bounds.tokens)
    return _exported(_Whole(subnet), (inputs,), (sizes,))


def prefill_program(subnet: Subnet, bounds: Bounds = FREE) -> ExportedProgram:
    """Return a decoder's program for a prompt: tokens (B, T) to logits (B, T, V) and the state."""
    inputs = torch.zeros(bounds.batch_hint, _tokens_hint(subnet, bounds), dtype=torch.int64)
    sizes = {**bounds.batch_sizes(), 1: Dim("tokens", max=bounds.tokens)}
    return _exported(_Prefill(subnet), (inputs,), (sizes,))


def decode_program(subnet: Subnet, bounds: Bounds = FREE, as_axis: bool = False) -> Decode:
    """Return a decoder's program for one more token.

    Args:
        subnet: the network.
        bounds: which sizes it takes.
        as_axis: take the number of tokens before as the length of an int64 tensor (P,) whose values
            do not count, for runtimes that have no whole numbers as inputs.

    Raises:
        NotImplementedError: naming a tensor whose size cannot be left free.
    """
    past, state = _example_state(subnet, bounds)
    before = Dim("past", min=0, max=bounds.tokens)
    axes, tensors = _free_axes(subnet), state_tensors(subnet, state)
    sizes: list[dict[int, Any]] = []
    for name, tensor in tensors.items():
        free = bounds.batch_sizes()
        for axis in axes[name]:
            follows = tensor.shape[axis] == past
            free[axis] = before if follows else Dim(f"held{len(sizes)}", min=0, max=bounds.tokens)
        sizes.append(free)
    given = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors.values()]
    token = torch.zeros(bounds.batch_hint, 1, dtype=torch.int64)
    count: Any = past, Dim.DYNAMIC(min=0, max=bounds.tokens)
    if as_axis:
        count = torch.zeros(past, dtype=torch.int64), {0: before}
    free_sizes = [bounds.batch_sizes(), count[1], *([tuple(sizes)] if sizes else [])]
    program = _exported(_Decode(subnet, state), (token, count[0], *given), tuple(free_sizes))
    return Decode(program, list(tensors))


class _Whole(nn.Module):
    def __init__(self, network: Subnet) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits


class _Prefill(_Whole):
    def forward(self, inputs: Tensor) -> Any:
        state = [
            None if part is None else growing(part, 0, _zeros)
            for part in self.network.init_state(inputs.shape[0], MANY_TOKENS)[:-1]
        ]
        logits = self.network(inputs, [*state, Position()])
        return (logits, *state_tensors(self.network, state).values())


class _Decode(_Whole):
    def __init__(self, network: Subnet, state: Sequence[Any]) -> None:
        super().__init__(network)
        self.state = state

    def forward(self, inputs: Tensor, past: Any = 0, *tensors: Tensor) -> Any:
        past = past.shape[0] if isinstance(past, Tensor) else past
        state = filled_state(self.state, tensors)
        for part in state:
            if part is not None:
                part.length = past
        logits = self.network(inputs, [*state, Position(past)])
        return (logits, *state_tensors(self.network, state).values())


def _zeros(shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _tokens_hint(subnet: Subnet, bounds: Bounds) -> int:
    """Return the number of tokens that branches are taken for."""
    return tokens_hint(subnet) if bounds.tokens is None else min(tokens_hint(subnet), bounds.tokens)


def _state_after(subnet: Subnet, past: int, batch: int = BATCH_HINT) -> list[Any]:
    """Return the state after a number of tokens, without values."""
    made = subnet.init_state(batch, MANY_TOKENS, torch.device("meta"))[:-1]
    return [None if part is None else growing(part, past, _shapes) for part in made]


def _shapes(shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _free_axes(subnet: Subnet) -> dict[str, list[int]]:
    """Return which axes of the state's tensors depend on the number of tokens before."""
    none, one = (state_tensors(subnet, _state_after(subnet, past)) for past in (0, 1))
    return {
        name: [axis for axis, size in enumerate(before.shape) if size != one[name].shape[axis]]
        for name, before in none.items()
    }


def _example_state(subnet: Subnet, bounds: Bounds) -> tuple[int, list[Any]]:
    """Return a number of tokens and the state after them, without values.

    `torch.export` takes sizes of 0 and 1 for numbers, so that free ones must be larger there.

    Raises:
        NotImplementedError: naming a tensor for which there is no such number.
    """
    axes, most = _free_axes(subnet), _tokens_hint(subnet, bounds)
    for past in (*(hint for hint in PAST_HINTS if hint < most), most - 1):
        state = _state_after(subnet, past, bounds.batch_hint)
        tensors = state_tensors(subnet, state)
        fixed = [name for name in axes if any(tensors[name].shape[a] < 2 for a in axes[name])]
        if not fixed:
            return past, state
    raise NotImplementedError(f"the size of {fixed[0]}")


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Record branches without bounds on the sizes, and recurrences as operators, within."""
    # Bounds are a setting of the thread, whichever environment it is made through.
    without_bounds = ShapeEnv().suppress_guards()
    with torch.inference_mode(False), torch.no_grad(), one_operator_each(), without_bounds:
        yield


def _exported(module: nn.Module, inputs: tuple[Any, ...], sizes: Any) -> ExportedProgram:
    with recording():
        program = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)
        # Buffers for many tokens that nothing reads, of which only the sizes counted.
        program.graph_module.graph.eliminate_dead_code()
        program = lean(program)
        add_scans(program)
        _reshape(program)
        return program


def _reshape(program: ExportedProgram) -> None:
    """Replace views: whether there can be one was decided by the sizes recorded with."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.target in views:
                    node.target = torch.ops.aten.reshape.default
            module.recompile()
