"""PyTorch on an NVIDIA GPU: captured CUDA graphs, timed by events, with cold caches."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hw_profiles.backends.base import Call, UnsupportedError
from hw_profiles.backends.cuda.clock import CudaClock
from hw_profiles.backends.cuda.device import describe_device, lacking_device
from hw_profiles.backends.cuda.graph_call import (
    MIN_REPEATS,
    CaptureError,
    GraphCall,
    PlainCall,
    capture,
    graph_of_replicas,
)
from hw_profiles.backends.cuda.precisions import only_with_kernels
from hw_profiles.backends.cuda.replicas import Replica, replicate
from hw_profiles.backends.eager import SENTINEL_SIZE
from hw_profiles.clock import Clock
from hw_profiles.workload import Workload

SENTINEL_PRODUCTS = 64
"""Products in one run of the sentinel: about a millisecond on a data centre GPU. Their number is
fixed, because tables state latencies as ratios to it."""
MEMORY_LEFT = 0.25
"""Share of the GPU's memory that prepared calls are to leave free."""
WARM_UPS = 2
RAMP_S = 0.5
"""Idle GPUs clock down; this much work brings the clock up again."""

log = logging.getLogger(__name__)


class CudaBackend:
    """PyTorch operators on the current CUDA device, replayed as graphs.

    Weights, states and inputs come from memory, not from the L2 cache: the graph goes round several
    copies of them. Matrix products use the precision the process is set to. Clocks are never
    changed.

    `plain` says which modules could not be captured and why, by class name; their latency is that
    of plain launches.

    Source: NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs"; PyTorch documentation, CUDA
    semantics, "CUDA Graphs" (warming up on a side stream, what must stay alive).
    """

    name = "cuda"
    summary = "PyTorch on an NVIDIA GPU, as CUDA graphs"

    def __init__(self) -> None:
        self.plain: dict[str, str] = {}

    def unavailable(self) -> str:
        """Return what is missing where there is no CUDA device."""
        return lacking_device()

    def version(self) -> str:
        """Return how operators are run, and cuDNN's version; `Device.torch` says the rest."""
        return f"CUDA graphs, cuDNN {torch.backends.cudnn.version()}"

    def accelerator(self) -> str:
        """Return the current device with its driver."""
        return describe_device(torch.cuda.current_device())

    def prepare(self, module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
        """Return a call that replays a graph of several runs; see `Backend.prepare`.

        Its `repeats` says how many runs; `clock` accounts for them. Where no graph can be captured
        the call launches one run.

        Raises:
            UnsupportedError: when a low-bit map has no kernel, or the GPU's memory is too small.
        """
        kind = type(getattr(module, "op", module)).__name__
        try:
            with torch.inference_mode(False), torch.no_grad():
                replicas = self._replicas(module, inputs, workload)
            with torch.inference_mode():
                self._warm_up(replicas)
                return self._graph(replicas, kind)
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"{kind} does not fit into the GPU's memory with workload {workload.name}; free "
                "memory of other programs, or choose a smaller batch or fewer tokens"
            ) from error

    def _replicas(self, module: nn.Module, inputs: Tensor, workload: Workload) -> list[Replica]:
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        return replicate(module, inputs, workload, current_device(), facts.L2_cache_size)

    def _warm_up(self, replicas: Sequence[Replica]) -> None:
        """Run everything on the stream that captures: each stream has workspaces of its own."""
        first, *others = replicas

        def run_all() -> None:
            with only_with_kernels(first.module):
                first.run()
            for replica in [*others, *[first] * WARM_UPS]:
                replica.run()

        _on_side_stream(run_all)

    def _graph(self, replicas: Sequence[Replica], kind: str) -> GraphCall | PlainCall:
        try:
            return graph_of_replicas(replicas, _side_stream(torch.cuda.current_device()))
        except CaptureError as error:
            self.plain[kind] = str(error)
            _say_plain(kind, str(error))
            return PlainCall(replicas, str(error))

    def sentinel(self) -> Call:
        """Return `SENTINEL_PRODUCTS` products of 512 x 512 matrices, as a graph."""
        return self._sentinel

    @functools.cached_property
    def _sentinel(self) -> GraphCall:
        generator = torch.Generator().manual_seed(0)
        shape = (2, SENTINEL_SIZE, SENTINEL_SIZE)
        left, right = torch.randn(shape, generator=generator).to(current_device())
        out = torch.zeros_like(left)

        def products() -> Tensor:
            for _ in range(SENTINEL_PRODUCTS):
                torch.mm(left, right, out=out)
            return out

        _on_side_stream(products)
        graph, output = capture([products], _side_stream(torch.cuda.current_device()))
        return GraphCall(graph, 1, output, (left, right))

    @contextlib.contextmanager
    def clock(self) -> Iterator[Clock]:
        """Return the clock that times by events, with the GPU's own clock brought up."""
        clock, sentinel = CudaClock(), self.sentinel()
        began = clock.now_ns()
        while clock.now_ns() - began < RAMP_S * 1e9:
            clock.elapsed_ns(sentinel, 8)
        yield clock
        torch.cuda.synchronize()


def short_of_memory() -> bool:
    """Whether prepared calls, each with copies of a module that fill the cache, hold too much.

    What nothing holds any more is given back to the device.
    """
    free, total = torch.cuda.mem_get_info()
    if free < MEMORY_LEFT * total:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
    return bool(free < MEMORY_LEFT * total)


def graphed(call: Call) -> GraphCall:
    """Return `MIN_REPEATS` runs of something that launches kernels, as a graph.

    Raises:
        CaptureError: when it makes the host wait for the device.
    """
    with torch.inference_mode():
        _on_side_stream(call)
        stream = _side_stream(torch.cuda.current_device())
        graph, output = capture([call] * MIN_REPEATS, stream)
    return GraphCall(graph, MIN_REPEATS, output, (call,))


def current_device() -> torch.device:
    """Return the device that PyTorch uses now."""
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream that graphs of a device are captured on; one, as each keeps workspaces."""
    return torch.cuda.Stream(device)


def _on_side_stream(run: Call) -> None:
    """Run on the stream that captures, and wait for it."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()


@functools.cache
def _say_plain(kind: str, reason: str) -> None:
    """Log, the first time, that a module is launched operator by operator."""
    log.warning("%s is timed by plain launches, no CUDA graph can be captured: %s", kind, reason)
