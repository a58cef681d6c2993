"""What a module does with a workload, as a function of tensors.

Shapes: B batch, T tokens, G key/value heads, S keys, K head width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hw_profiles.backends.base import state_parts
from hw_profiles.backends.onnx_runtime.linear import with_exportable_linears
from hw_profiles.workload import Workload
from searchspace.mixers.base import SharedKV
from searchspace.specs import MixerSpec


@dataclass
class Program:
    """A function of tensors alone, without side effects.

    Args:
        run: returns the module's result and, in a decode step, the tensors of the state
            afterwards, in the order of `inputs[1:]`.
        inputs: what it takes: the module's input, then the tensors of the state.
    """

    run: Callable[..., list[Tensor]]
    inputs: list[Tensor]


@dataclass
class _State:
    """A module's state, or what a layer borrows, with its tensors apart."""

    state: Any
    shared: SharedKV | None
    tensors: list[Tensor]

    def filled(self, tensors: list[Tensor]) -> tuple[Any, SharedKV | None, list[Any]]:
        """Return copies of both that hold the given tensors, and all that was copied."""
        rest = list(tensors)
        parts = self.state if isinstance(self.state, list) else [self.state]
        filled = [_filled(part, rest) for part in parts]
        shared = _filled(self.shared, rest)
        state = filled if isinstance(self.state, list) else filled[0]
        return state, shared, [*filled, shared]


def program_of(module: nn.Module, inputs: Tensor, workload: Workload) -> Program:
    """Return what a module does with a workload as a function of tensors.

    Args:
        module: a sub-block or network; it is not changed.
        inputs: of the workload's shape.
        workload: a decode step starts from a state of `workload.tokens` tokens, all zeros.
    """
    exportable = with_exportable_linears(module, workload.batch * workload.new_tokens)
    before = _state_of(module, workload)

    def run(x: Tensor, *tensors: Tensor) -> list[Tensor]:
        # Clones: without them what the module writes would be copied back into the inputs.
        state, shared, parts = before.filled([tensor.clone() for tensor in tensors])
        arguments: tuple[Any, ...] = () if state is None and shared is None else (state,)
        arguments = arguments if shared is None else (*arguments, shared)
        return [exportable(x, *arguments), *(tensor for p in parts for tensor in _tensors(p))]

    return Program(torch.func.functionalize(run), [inputs, *before.tensors])


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Say that operators are being recorded, so that no tensor is kept (`cached_constant`)."""
    flag = "_is_compiling_flag"
    before = getattr(torch.compiler, flag)
    setattr(torch.compiler, flag, True)
    try:
        yield
    finally:
        setattr(torch.compiler, flag, before)


def _state_of(module: Any, workload: Workload) -> _State:
    spec = getattr(module, "spec", None)
    borrows = isinstance(spec, MixerSpec) and spec.kv_shared
    state: Any = None
    shared: SharedKV | None = None
    if workload.phase == "decode" or borrows:
        state = module.init_state(workload.batch, workload.max_tokens)
    if borrows:
        start = workload.max_tokens - workload.new_tokens
        shared, state = SharedKV(state.k_BGSK, state.v_BGSK, start), None
    parts = state_parts(state)
    for part in parts:
        part.length = workload.tokens
    found = [tensor for part in [*parts, shared] for tensor in _tensors(part)]
    return _State(state, shared, found)


def _tensors(part: Any) -> list[Tensor]:
    """Return all tensors of a state."""
    if part is None or not is_dataclass(part):
        return []
    values = [getattr(part, field.name) for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def _filled(part: Any, tensors: list[Tensor]) -> Any:
    """Return a copy of a state with the next tensors, which are taken from the list."""
    if part is None:
        return None
    part = copy.copy(part)
    for field in fields(part):
        if isinstance(getattr(part, field.name), Tensor):
            setattr(part, field.name, tensors.pop(0))
    return part
