"""What timing needs from the system: time, how long threads had to wait, and priority."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from searchspace.errors import UserError

REALTIME_PRIORITY = 5
# What one involuntary context switch costs at least where the kernel does not say: a scheduler
# slice is longer, so a sample with one is always dropped.
SWITCH_NS = 1_000_000


class Clock(Protocol):
    """Time and disturbance, replaceable in tests."""

    def now_ns(self) -> int:
        """Return monotonic time."""
        ...

    def run_delay_ns(self) -> int:
        """Return how long this process's threads have been ready to run but were not, in total."""
        ...

    def elapsed_ns(self, call: Callable[[], object], count: int) -> int:
        """Return how long `count` calls take together, one after the other."""
        ...

    def sleep(self, seconds: float) -> None:
        """Give the processor away."""
        ...


class SystemClock:
    """The real clock.

    The run delay is field 2 of ``/proc/self/task/*/schedstat`` summed over threads, or, where that
    is missing, the number of involuntary context switches.

    Source: Linux documentation, scheduler/sched-stats.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self.refresh_threads()

    def refresh_threads(self) -> None:
        """Take note of threads that were started meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir("/proc/self/task"):
                if thread not in self._files:
                    path = f"/proc/self/task/{thread}/schedstat"
                    with contextlib.suppress(OSError):
                        self._files[thread] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the files; the clock reads context switches from then on."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def now_ns(self) -> int:
        """Return monotonic time."""
        return time.perf_counter_ns()

    def run_delay_ns(self) -> int:
        """Return how long this process's threads have been ready to run but were not, in total."""
        if not self._files:
            return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * SWITCH_NS
        total = 0
        for thread, descriptor in list(self._files.items()):
            try:
                total += int(os.pread(descriptor, 64, 0).split()[1])
            except (OSError, IndexError):
                os.close(self._files.pop(thread))
        return total

    def elapsed_ns(self, call: Callable[[], object], count: int) -> int:
        """Return how long `count` calls take together, one after the other."""
        calls, now = range(count), time.perf_counter_ns
        start = now()
        for _ in calls:
            call()
        return max(now() - start, 1)

    def sleep(self, seconds: float) -> None:
        """Give the processor away."""
        time.sleep(seconds)


@contextlib.contextmanager
def system_clock() -> Iterator[SystemClock]:
    """Open a `SystemClock` and close it afterwards."""
    clock = SystemClock()
    try:
        yield clock
    finally:
        clock.close()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Do not collect garbage until the block ends."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def realtime_scheduling(enabled: bool) -> Iterator[None]:
    """Run all present threads before every ordinary process (SCHED_FIFO) inside the block.

    Keep bursts below a scheduler slice and sleep as long as you ran: others share the machine.
    Threads and processes started inside the block do not inherit the priority.

    Raises:
        UserError: where the system does not allow it.
    """
    if not enabled:
        yield
        return
    if not hasattr(os, "sched_setscheduler"):
        raise UserError("real-time scheduling needs Linux; leave it off on this system")
    before: dict[int, tuple[int, os.sched_param]] = {}
    try:
        for name in os.listdir("/proc/self/task"):
            thread = int(name)
            before[thread] = (os.sched_getscheduler(thread), os.sched_getparam(thread))
            policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(thread, policy, os.sched_param(REALTIME_PRIORITY))
        yield
    except PermissionError as error:
        raise UserError(
            "real-time scheduling is not allowed for this user (it needs root or CAP_SYS_NICE); "
            "leave it off"
        ) from error
    finally:
        for thread, (policy, parameter) in before.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.sched_setscheduler(thread, policy & ~os.SCHED_RESET_ON_FORK, parameter)
