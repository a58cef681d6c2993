"""Calls that recur, replayed as CUDA graphs.

A step of small networks is bound by launches: a graph is launched once. It works on fixed memory,
so what changes from call to call is copied into the tensors that it was captured with.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hw_profiles.backends.cuda.graph_call import CaptureError, capture, first_line, tensors_read
from nas.training.passes import unchanged

RUNS_BEFORE_CAPTURE = 2
"""The first run compiles kernels and makes constants; the second does so for the stream that
captures, which has workspaces of its own."""
MAX_GRAPHS = 8
"""Each keeps the memory of a forward and a backward pass."""
MAX_COUNTED = 512
"""Calls whose runs are counted: random archs come once and are forgotten."""

Tensors = tuple[Tensor | None, ...]
Run = Callable[[Tensors], Tensors]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """A captured call.

    Args:
        graph: to replay.
        inputs: what it reads; new values are copied into them.
        outputs: what it writes at every replay.
        kept: everything else that it reads and somebody else might free.
    """

    graph: Any
    inputs: Tensors
    outputs: Tensors
    kept: Sequence[object]

    def replay(self, inputs: Tensors) -> Tensors:
        """Start it on other inputs of the same shapes; returns without waiting."""
        for static, given in zip(self.inputs, inputs, strict=True):
            # What an earlier graph writes where this one reads is there already.
            if static is not None and given is not None and static is not given:
                static.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs


class Graphs:
    """Runs calls; those that come again and again as graphs.

    Args:
        device: a CUDA device.
        written: gives the tensors that calls change besides their outputs, always in the same
            memory once a call has run.
    """

    def __init__(self, device: torch.device, written: Callable[[], Sequence[Tensor]]) -> None:
        self._written = written
        self._stream = torch.cuda.Stream(device)
        self._recorded: dict[Hashable, Recorded] = {}
        self._runs: OrderedDict[Hashable, int] = OrderedDict()
        self._plain: set[Hashable] = set()
        self._said: set[tuple[str, str]] = set()

    def forget(self) -> None:
        """Drop all graphs and counts."""
        self._recorded.clear()
        self._runs.clear()
        self._plain.clear()

    def has(self, key: Hashable, inputs: Tensors) -> bool:
        """Whether a call would be a replay."""
        return (key, _shapes(inputs)) in self._recorded

    def __call__(self, name: str, key: Hashable, run: Run, inputs: Tensors) -> Tensors:
        """Return what `run` makes of the inputs; the same memory at every replay.

        Args:
            name: of the call, for the log.
            key: the same for calls that differ in their inputs' values only.
            run: launches the work; it must look at no value.
            inputs: tensors that change from call to call.
        """
        key = key, _shapes(inputs)
        if key in self._recorded:
            return self._recorded[key].replay(inputs)
        runs = self._count(key)
        if runs == 0 or key in self._plain:
            return run(inputs)
        if runs < RUNS_BEFORE_CAPTURE:
            return self._run_aside(run, inputs)
        if len(self._recorded) >= MAX_GRAPHS:
            self._give_up(key, name, f"{MAX_GRAPHS} graphs are held already")
            return run(inputs)
        try:
            self._recorded[key] = self._record(run, inputs)
        except CaptureError as error:
            self._give_up(key, name, str(error))
            return run(inputs)
        except torch.OutOfMemoryError as error:
            self._give_up(key, name, first_line(error))
            torch.cuda.empty_cache()
            return run(inputs)
        return self._recorded[key].replay(inputs)

    def _count(self, key: Hashable) -> int:
        """Count one more run; return how many there were before."""
        runs = self._runs.pop(key, 0)
        self._runs[key] = runs + 1
        if len(self._runs) > MAX_COUNTED:
            self._runs.popitem(last=False)
        return runs

    def _run_aside(self, run: Run, inputs: Tensors) -> Tensors:
        """Run on the stream that captures, in order with the work before and after."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = run(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, run: Run, inputs: Tensors) -> Recorded:
        """Capture a call without any effect of it.

        Raises:
            CaptureError: when it makes the host wait for the device, or the capture breaks off.
        """
        torch.cuda.synchronize()
        with unchanged(self._written()):
            torch.cuda.synchronize()
            kept = tensors_read(lambda: run(inputs), self._stream)
            torch.cuda.synchronize()
        graph, outputs = capture([lambda: run(inputs)], self._stream)
        assert isinstance(outputs, tuple)
        return Recorded(graph, inputs, outputs, kept)

    def _give_up(self, key: Hashable, name: str, reason: str) -> None:
        self._plain.add(key)
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            log.warning("%s is run operator by operator, not as a CUDA graph: %s", name, reason)


def _shapes(tensors: Tensors) -> Hashable:
    return tuple(None if t is None else (t.shape, t.dtype, t.stride()) for t in tensors)
