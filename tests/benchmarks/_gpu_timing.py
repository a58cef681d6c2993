"""Timing calls that take turns: by CUDA events on a GPU, by the wall clock elsewhere.

On a GPU launches are queued behind a kernel that only waits, so that what is timed is the GPU's
work and not Python's. A sample runs the call on several sets of inputs, together larger than the
L2 cache, which is filled with other memory before; their results are kept until it ends, so that
these are not written to one place in the cache either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
LEAST_SCRATCH_BYTES = 1 << 28
LONGEST_LEAD_S = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median_s: over samples.
        low_s: the 10th percentile.
        high_s: the 90th percentile.
        num_samples: how many there were.
        host_s: what the call kept the processor busy for.
    """

    median_s: float
    low_s: float
    high_s: float
    num_samples: int
    host_s: float


class Clock(Protocol):
    """What times a few calls."""

    l2_bytes: int

    def sample_s(self, calls: Sequence[Call], host_s: float) -> float:
        """Return the seconds of one call; `host_s` is what one keeps the processor busy for."""

    def synchronize(self) -> None:
        """Wait for everything that was launched."""


class CpuClock:
    """The wall clock."""

    l2_bytes = 0

    def sample_s(self, calls: Sequence[Call], host_s: float) -> float:
        start = time.perf_counter()
        kept = [call() for call in calls]
        seconds = time.perf_counter() - start
        return seconds / len(kept)

    def synchronize(self) -> None:
        return


class CudaClock:
    """CUDA events around queued launches.

    Args:
        device: whose stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(4 * self.l2_bytes, LEAST_SCRATCH_BYTES)
        self.scratch = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self.cycles_per_s = self._cycles_per_s()

    def _cycles_per_s(self) -> float:
        cycles = 20_000_000
        for _ in range(3):  # the first ones raise the clock
            start, end = self._events()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (start.elapsed_time(end) * 1e-3)

    def _events(self) -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample_s(self, calls: Sequence[Call], host_s: float) -> float:
        start, end = self._events()
        lead_s = min(1.5 * host_s * len(calls) + 5e-5, LONGEST_LEAD_S)
        # Read and not written: what has to leave the cache later is not charged to the call.
        self.scratch.sum()
        torch.cuda._sleep(int(lead_s * self.cycles_per_s))
        start.record()
        kept = [call() for call in calls]
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(kept)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_of(device: torch.device) -> Clock:
    """Return the clock for what runs on a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def host_seconds(call: Call, clock: Clock) -> float:
    """Return what a call keeps the processor busy for: the least of three."""
    least = float("inf")
    for _ in range(3):
        clock.synchronize()
        start = time.perf_counter()
        kept = call()
        least = min(least, time.perf_counter() - start)
        clock.synchronize()
        del kept
    return least


def take_turns(
    calls: Mapping[str, Sequence[Call]],
    clock: Clock,
    seconds: float,
    most_samples: int = 50,
    least_samples: int = 5,
) -> dict[str, Timing]:
    """Time every name's calls once a round, the first one in turn, until `seconds` are over.

    One that is slower than all others together is left out of most rounds.
    """
    host = {name: host_seconds(some[0], clock) for name, some in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    taken: dict[str, float] = {}
    deadline, names = time.monotonic() + seconds, list(calls)
    for turn in range(most_samples):
        if turn >= least_samples and time.monotonic() > deadline:
            break
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            others = sum(taken.values()) - taken.get(name, 0.0)
            if turn >= least_samples and turn % 4 and taken[name] > max(others, 0.02):
                continue
            start = time.monotonic()
            samples[name].append(clock.sample_s(calls[name], host[name]))
            taken[name] = time.monotonic() - start
    return {name: _timing(samples[name], host[name]) for name in calls}


def _timing(samples: list[float], host_s: float) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered), host_s)
