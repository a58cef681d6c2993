"""Calls of CUDA networks: a captured graph that is replayed, or plain launches where none can be.

A small network launched operator by operator takes as long as Python does; a graph takes as long
as the device does. One graph holds several runs, one after the other, so that starting it does not
count either; `repeats` says how many, and clocks divide by it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hw_profiles.backends.base import Call
from hw_profiles.backends.cuda.replicas import Replica
from hw_profiles.clock import no_garbage_collection
from hw_profiles.tensors import tensors_in
from nas_kernels.constants import constants_used

MIN_REPEATS = 10
"""Runs in a graph at least."""
SYNCHRONIZING = "synchronizing"
"""What PyTorch's error says of an operator that makes the host wait for the device."""

_failed: list[object] = []
# Graphs whose capture broke off are kept for ever: PyTorch's allocator goes on asking them whether
# they own a stream, and would ask freed memory.


class CaptureError(Exception):
    """A module cannot be captured; the message says why, in one line."""


@dataclass
class GraphCall:
    """A captured graph to replay.

    Args:
        graph: of `repeats` runs.
        repeats: runs in one call.
        output: what the last run returns; each call writes it anew.
        kept: everything the graph reads that somebody else might free.
    """

    graph: Any
    repeats: int
    output: object = None
    kept: Sequence[object] = ()

    def __call__(self) -> object:
        """Start `repeats` runs; returns without waiting for them."""
        self.graph.replay()
        return self.output


@dataclass
class PlainCall:
    """Launches of one operator after the other, on each replica in turn.

    Args:
        replicas: at least one.
        reason: why there is no graph.
        repeats: runs in one call.
    """

    replicas: Sequence[Replica]
    reason: str = ""
    repeats: int = 1
    _turns: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._turns = itertools.cycle(self.replicas)

    def __call__(self) -> object:
        """Launch one run; returns without waiting for it."""
        replica: Replica = next(self._turns)
        return replica.run()


def repeats_of(call: Callable[[], object]) -> int:
    """Return how many runs of the workload one call makes: 1 where it does not say."""
    return int(getattr(call, "repeats", 1))


def num_repeats(replicas: int) -> int:
    """Return how many runs a graph holds: as many of each replica, `MIN_REPEATS` at least."""
    return replicas * -(-MIN_REPEATS // replicas)


def graph_of_replicas(replicas: Sequence[Replica], stream: torch.cuda.Stream) -> GraphCall:
    """Capture runs of the replicas in turn.

    Each was run before on this stream: what modules make at their first call is made.

    Raises:
        CaptureError: when the module makes the host wait, or the capture breaks off.
    """
    kept = [*replicas, *tensors_read(replicas[0].run, stream)]
    repeats = num_repeats(len(replicas))
    turns = list(itertools.islice(itertools.cycle(replicas), repeats))
    graph, output = capture([replica.run for replica in turns], stream)
    return GraphCall(graph, repeats, output, kept)


def tensors_read(run: Call, stream: torch.cuda.Stream) -> list[Tensor]:
    """Run once and return every tensor that was read but not made: weights, masks, tables.

    A graph knows addresses only. Masks that depend on shapes are kept in caches that drop the
    oldest, and a replay would read what has taken their place. What kernels of our own read, no
    mode sees: of that, only what comes from such a cache is returned.

    Raises:
        CaptureError: when an operator makes the host wait for the device.
    """
    before = torch.cuda.get_sync_debug_mode()
    with (
        torch.cuda.stream(stream),
        constants_used() as constants,
        ReadTensors() as read,
        warnings.catch_warnings(),
    ):
        # PyTorch announces that the mode does not find every waiting operator; `capture` does.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if SYNCHRONIZING not in str(error):
                raise
            raise CaptureError(first_line(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return [*read.found.values(), *tensors_in(constants)]


def capture(runs: Sequence[Call], stream: torch.cuda.Stream) -> tuple[Any, object]:
    """Capture calls into one graph; returns it and what the last call returned.

    Raises:
        CaptureError: when the capture breaks off.
    """
    graph, output = torch.cuda.CUDAGraph(), None
    try:
        # The first context puts the stream back: where a capture breaks off, the last one does not.
        with (
            torch.cuda.stream(stream),
            no_garbage_collection(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            for run in runs:
                output = run()
    except torch.OutOfMemoryError:
        _failed.append(graph)
        raise
    except RuntimeError as error:
        _failed.append(graph)
        torch.cuda.synchronize()
        raise CaptureError(first_line(error.__context__ or error)) from error
    return graph, output


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; PyTorch adds pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ReadTensors(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Finds the tensors that operators inside the block read and did not make.

    Afterwards `found` holds one tensor for each memory that was read, by its address. Our own
    kernels run as they do without it, so that the run is the one that is captured.
    """

    lets_kernels_run = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note what it reads and makes."""
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            address = tensor.untyped_storage()._cdata
            if address not in self._made:
                self.found.setdefault(address, tensor)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            address = tensor.untyped_storage()._cdata
            if address not in self.found:
                self._made.add(address)
        return result
