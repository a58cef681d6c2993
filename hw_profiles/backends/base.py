"""`Backend`: what turns a sub-block or a network and a workload into something to call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from hw_profiles.clock import Clock
from hw_profiles.workload import Workload
from searchspace.errors import UserError

Call = Callable[[], object]


class UnsupportedError(UserError):
    """A backend cannot run a module; the message says which, and why."""


def state_parts(state: Any) -> list[Any]:
    """Return what a sub-block's or a network's state consists of; each part knows its `length`."""
    parts = state if isinstance(state, list) else [state]
    return [part for part in parts if part is not None]


class Backend(Protocol):
    """A way to run networks; part of the device that a latency is measured on.

    Args:
        name: its key in `BACKENDS`.
        summary: one line for `--help`.
    """

    name: str
    summary: str

    def unavailable(self) -> str:
        """Return what this machine lacks, with what to do; empty where the backend can be used."""
        ...

    def version(self) -> str:
        """Return the library's version and whatever else about it changes latencies."""
        ...

    def accelerator(self) -> str:
        """Return the accelerator with its driver; empty for processors."""
        ...

    def prepare(self, module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
        """Return a call that runs the workload once, again and again from the same state.

        A decode step starts from a state that holds `workload.tokens` tokens; the token it adds is
        forgotten before the next call.

        Args:
            module: a packed sub-block or `Subnet` in evaluation mode, on the CPU; it is not
                changed, and may be freed once the call is.
            inputs: activations (B, T, D), token ids (B, T) or images; T is 1 for decode.
            workload: what to run.

        Raises:
            UnsupportedError: when the backend cannot run the module.
        """
        ...

    def sentinel(self) -> Call:
        """Return one run of the yardstick: a 512 x 512 x 512 fp32 matrix product of this backend,
        or as many of them as take the device about a millisecond.
        """
        ...

    def clock(self) -> AbstractContextManager[Clock]:
        """Return the clock that times calls of this backend."""
        ...
