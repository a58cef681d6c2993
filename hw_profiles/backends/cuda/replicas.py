"""`Replica`: one copy of a module on another device, with its inputs and state, ready to run.

Several replicas that are run in turn keep the weights, states and inputs of each out of the cache:
between two runs of one, more bytes than the cache holds were read for the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hw_profiles.backends.base import state_parts
from hw_profiles.workload import Workload

MAX_REPLICAS = 64
"""Of small modules; what is smaller than a 64th of the cache stays in it, as it would in a network
that fits as a whole."""


@dataclass(frozen=True)
class Replica:
    """A module that runs a workload again and again from the same state.

    Args:
        module: on the device, in evaluation mode; nobody else's.
        inputs: what it is called with.
        state: of a decode step, filled up to the workload's context; None for prefill and for
            modules that remember nothing.
        before: what every part of the state was, to be put back before each run. It also keeps
            alive the memory that a captured graph reads.
    """

    module: nn.Module
    inputs: Tensor
    state: Any = None
    before: tuple[tuple[Any, dict[str, Any]], ...] = ()

    @classmethod
    def of(
        cls, module: nn.Module, inputs: Tensor, workload: Workload, device: torch.device
    ) -> Replica:
        """Copy a module and its inputs to a device; both stay as they are."""
        with torch.no_grad():
            placed = copy.deepcopy(module).to(device).eval().requires_grad_(False)
            given = inputs.detach().to(device, copy=True)
            if workload.phase == "prefill":
                return cls(placed, given)
            init_state: Any = placed.init_state
            state = init_state(workload.batch, workload.max_tokens, device)
        parts = state_parts(state)
        for part in parts:
            part.length = workload.tokens
        return cls(placed, given, state, tuple((part, dict(vars(part))) for part in parts))

    def run(self) -> object:
        """Run the workload once; a decode step finds the state as it was at first."""
        for part, fields in self.before:
            vars(part).update(fields)
        if self.state is None:
            return self.module(self.inputs)
        return self.module(self.inputs, self.state)

    def num_bytes(self) -> int:
        """Return the bytes of the weights, the inputs and the state."""
        fields = tree_leaves([fields for _, fields in self.before])
        tensors = [*self.module.parameters(), *self.module.buffers(), self.inputs, *fields]
        return storage_bytes(item for item in tensors if isinstance(item, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind tensors, shared memory counted once."""
    storages = {item.untyped_storage()._cdata: item.untyped_storage() for item in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def num_replicas(replica_bytes: int, cache_bytes: int) -> int:
    """Return how many replicas in turn keep each one out of a cache.

    Args:
        replica_bytes: of one; above twice the cache it replaces itself there.
        cache_bytes: size of the cache; 0 where there is none.
    """
    if replica_bytes >= 2 * cache_bytes:
        return 1
    return min(MAX_REPLICAS, math.ceil(cache_bytes / max(replica_bytes, 1)) + 1)


def replicate(
    module: nn.Module, inputs: Tensor, workload: Workload, device: torch.device, cache_bytes: int
) -> list[Replica]:
    """Return the replicas of a module that `num_replicas` asks for; at least one.

    Args:
        module: packed, in evaluation mode; not changed.
        inputs: of the workload's shape; not changed.
        workload: what is run.
        device: where the replicas live.
        cache_bytes: size of the cache they are kept out of.
    """
    first = Replica.of(module, inputs, workload, device)
    others = num_replicas(first.num_bytes(), cache_bytes) - 1
    # From the first one: copies within a device are faster than copies to it.
    more = [Replica.of(first.module, first.inputs, workload, device) for _ in range(others)]
    return [first, *more]
