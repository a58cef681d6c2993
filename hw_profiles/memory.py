"""Peak memory of a forward pass, exactly and without noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hw_profiles.backends.eager import runner
from hw_profiles.workload import Workload
from searchspace.ends import example_inputs
from searchspace.linear import Linear
from searchspace.subnet import Subnet

MIB = 2**20


def peak_mib(network: Subnet, workload: Workload) -> float:
    """Return the most memory that the tensors of one pass take at once, in MiB.

    Counts weights, what low-bit kernels keep beside them, state, input, and every activation from
    the operator that makes it to the moment it is freed. Scratch space inside single operators is
    not seen (matrix products and fused attention need little), nor is the interpreter itself.
    Resident set size would be the obvious alternative, but allocators keep freed memory, so it only
    says what the process once needed.

    Args:
        network: in evaluation mode.
        workload: its batch and tokens.
    """
    inputs = example_inputs(network.arch.ends, workload.batch, workload.new_tokens)
    with torch.no_grad():
        # Constants that modules keep for later (position tables, masks) are made here, once.
        runner(network, inputs, workload)()
    with torch.no_grad(), TensorMemory() as memory:
        for tensor in (*network.parameters(), *network.buffers(), *kept_tensors(network), inputs):
            memory.track(tensor)
        runner(network, inputs, workload)()
    return float(memory.peak_bytes / MIB)


def kept_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return what low-bit layers have derived from their stored tensors and keep for later calls.

    Such as the 4-bit kernel's own layout of the weights: memory that is taken, but never stored.
    """
    leaves = [
        leaf
        for child in module.modules()
        if isinstance(child, Linear)
        for leaf in tree_leaves(child._runtime)
    ]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts the bytes of all tensor storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self._alive: dict[int, int] = {}

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        self._alive[address] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, address).atexit = False

    def _freed(self, address: int) -> None:
        self.live_bytes -= self._alive.pop(address, 0)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf)
        return result
