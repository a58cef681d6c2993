"""PyTorch as it is, one operator after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hw_profiles.backends.base import Call, state_parts
from hw_profiles.clock import Clock, system_clock
from hw_profiles.workload import Workload

SENTINEL_SIZE = 512


class EagerBackend:
    """PyTorch operators on the CPU."""

    name = "eager"
    summary = "PyTorch, one operator after the other"

    def unavailable(self) -> str:
        """Return an empty text: it can be used everywhere."""
        return ""

    def version(self) -> str:
        """Return an empty text: `Device.torch` says it."""
        return ""

    def accelerator(self) -> str:
        """Return an empty text: none is used."""
        return ""

    def prepare(self, module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
        """Return a call; see `Backend.prepare`."""
        return runner(module, inputs, workload)

    def sentinel(self) -> Call:
        """Return a matrix product into an existing matrix."""
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, SENTINEL_SIZE, SENTINEL_SIZE, generator=generator)
        out = torch.empty(SENTINEL_SIZE, SENTINEL_SIZE)
        return lambda: torch.mm(left, right, out=out)

    def clock(self) -> AbstractContextManager[Clock]:
        """Return the system's clock."""
        return system_clock()


def runner(module: Any, inputs: Tensor, workload: Workload) -> Call:
    """Return a call that runs a module eagerly, where it is; see `Backend.prepare`."""
    if workload.phase == "prefill":
        return lambda: module(inputs)
    state = module.init_state(workload.batch, workload.max_tokens)
    parts, context = state_parts(state), workload.tokens

    def step() -> object:
        for part in parts:
            part.length = context
        return module(inputs, state)

    return step
