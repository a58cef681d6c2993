"""`CudaClock`: time as the device sees it, by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hw_profiles.backends.cuda.graph_call import repeats_of

NS_PER_MS = 1e6


class CudaClock:
    """A `hw_profiles.clock.Clock` for calls that start work on the current CUDA stream.

    Durations are those between two events on the stream. Have a call of the same kind started just
    before: while the device works on it the host gets ahead, and starting does not count.

    Source: NVIDIA, CUDA C++ Programming Guide, "Events" (elapsed time between events).
    """

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def now_ns(self) -> int:
        """Return monotonic time of the host."""
        return time.perf_counter_ns()

    def run_delay_ns(self) -> int:
        """Return 0: the device goes on when a thread of the host has to wait."""
        return 0

    def elapsed_ns(self, call: Callable[[], object], count: int) -> int:
        """Return how long `count` runs take together, one after the other; waits for them.

        A call that makes several runs (`GraphCall.repeats`) is made as often as `count` runs need
        at least, and its time is scaled to `count`.
        """
        repeats = repeats_of(call)
        calls = -(-count // repeats)
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        elapsed_ns = self._start.elapsed_time(self._end) * NS_PER_MS
        return max(round(elapsed_ns * count / (calls * repeats)), 1)

    def sleep(self, seconds: float) -> None:
        """Give the processor away."""
        time.sleep(seconds)
