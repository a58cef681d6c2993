"""Counting the storages that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hw_profiles.tensors import tensors_in
from searchspace.linear import Linear


def kept_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return what low-bit layers have derived from their stored tensors and keep for later calls.

    Such as the 4-bit kernel's own layout of the weights: memory that is taken, but never stored.
    """
    return tensors_in([child._runtime for child in module.modules() if isinstance(child, Linear)])


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts the bytes of all tensor storages that are alive, and their peak.

    What operators return counts from then until it is freed; what they read and nothing returned
    must have been there before, and counts from the beginning on.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self.found: list[torch.Tensor] = []
        """Tensors from before, one for each storage."""
        self._alive: dict[int, int] = {}

    def track(self, tensor: torch.Tensor) -> bool:
        """Count a tensor's storage until it is freed; returns whether it was not counted yet."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return False
        self._alive[address] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, address).atexit = False
        return True

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _found(self, tensor: torch.Tensor) -> None:
        peak_bytes = self.peak_bytes
        if self.track(tensor):
            self.found.append(tensor)
            self.peak_bytes = peak_bytes + tensor.untyped_storage().nbytes()

    def _freed(self, address: int) -> None:
        self.live_bytes -= self._alive.pop(address, 0)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it reads and returns."""
        for tensor in tensors_in((args, kwargs)):
            self._found(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.track(tensor)
        return result


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the different storages behind tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
