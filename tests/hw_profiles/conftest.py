"""Clocks for timing tests, and a process left as it was found."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from hw_profiles import process, subnets, timing
from hw_profiles.backends import eager


class FakeClock:
    """Time that passes only when a target says so.

    Args:
        speed: factor of every duration as a function of time in seconds: the drift.
        disturbance: returns the microseconds a call has to wait for a processor.
    """

    def __init__(
        self,
        speed: Callable[[float], float] = lambda seconds: 1.0,
        disturbance: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.time_ns = 0
        self.delay_ns = 0
        self.slept_s = 0.0
        self.speed = speed
        self.disturbance = disturbance

    def now_ns(self) -> int:
        return self.time_ns

    def run_delay_ns(self) -> int:
        return self.delay_ns

    def elapsed_ns(self, call: Callable[[], object], count: int) -> int:
        start = self.now_ns()
        for _ in range(count):
            call()
        return max(self.now_ns() - start, 1)

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.time_ns += int(seconds * 1e9)

    def call(self, duration_us: float) -> Callable[[], None]:
        """Return a target that takes this long at speed 1."""

        def run() -> None:
            wait_ns = int(self.disturbance() * 1e3)
            self.delay_ns += wait_ns
            self.time_ns += wait_ns
            self.time_ns += int(duration_us * 1e3 * self.speed(self.time_ns / 1e9))

        return run


class UndisturbedClock(FakeClock):
    """The real time, on a machine where nothing ever waits: tests of logic must not be refused."""

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make profiling use `UndisturbedClock` and as few rounds as it can."""

    @contextlib.contextmanager
    def clock() -> Iterator[UndisturbedClock]:
        yield UndisturbedClock()

    monkeypatch.setattr(eager, "system_clock", clock)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(timing, "REFERENCE_SAMPLES", 12)
    monkeypatch.setattr(subnets, "SUBNET_SAMPLE_MS", 0.05)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run with one thread and restore what the process had."""
    threads, applied = torch.get_num_threads(), process._applied
    process.prepare_process(1)
    yield
    torch.set_num_threads(threads)
    process._applied = applied
