"""The timing protocol: short interleaved samples, each as a ratio to a sentinel timed beside it.

On a shared machine the clock drifts by up to two times within minutes and threads are taken off
their processors at any moment. So every round times every target once, in a new order, in short
stretches that begin and end with a sentinel matrix product; a target's value is the median over
rounds of its ratio to the sentinel of the same stretch, and samples during which a thread waited
for a processor are dropped.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hw_profiles.backends.base import Backend, Call
from hw_profiles.clock import Clock, no_garbage_collection, realtime_scheduling
from hw_profiles.samples import (
    MAX_DELAY_SHARE,
    Sample,
    Timing,
    enough,
    relative_error,
    summarise,
)
from hw_profiles.samples import TooBusyError as TooBusyError

MIN_ROUNDS = 3
SENTINEL_SHARE = 0.2
"""Share of the time that goes to the sentinel."""
SENTINELS = 3
"""Sentinel samples of each stretch: a round may be long against the drift of the clock, a stretch
is not."""
STRETCH_US = 20_000.0
SHORT_CALL_US = 500.0
"""Calls shorter than this are run twice, others once, before a sample."""
REST_AFTER_DISTURBANCE_S = 0.002
REFERENCE_SAMPLES = 100


@dataclass(frozen=True)
class Sentinel:
    """The yardstick every latency is a ratio to.

    Args:
        call: one run of it.
        reference_us: how long one run takes on this device at the speed latencies are stated for.
    """

    call: Call
    reference_us: float

    @classmethod
    def measured(cls, call: Call, clock: Clock, realtime: bool = False) -> Sentinel:
        """Return a sentinel with its reference timed now.

        The reference is the time it takes when nothing disturbs it: a low quantile of the
        undisturbed samples, which repeats far better than their median.
        """
        for _ in range(3):
            call()
        _refresh(clock)
        with realtime_scheduling(realtime), no_garbage_collection():
            samples = [_reference_sample(call, clock) for _ in range(REFERENCE_SAMPLES)]
        undisturbed = [us for us, share in samples if share <= MAX_DELAY_SHARE]
        durations = undisturbed if len(undisturbed) >= 10 else [us for us, _ in samples]
        return cls(call, statistics.quantiles(durations, n=10)[0])


def measured_sentinel(backend: Backend, realtime: bool = False) -> Sentinel:
    """Return a backend's sentinel with its reference timed now."""
    with torch.inference_mode(), backend.clock() as clock:
        return Sentinel.measured(backend.sentinel(), clock, realtime)


def _reference_sample(call: Call, clock: Clock) -> tuple[float, float]:
    """Return the time of one call in microseconds, and the share of it threads had to wait."""
    clock.sleep(REST_AFTER_DISTURBANCE_S)
    call()
    delay = clock.run_delay_ns()
    elapsed_ns = clock.elapsed_ns(call, 1)
    return elapsed_ns / 1e3, (clock.run_delay_ns() - delay) / elapsed_ns


@dataclass
class _Session:
    """Takes samples and keeps them."""

    targets: dict[str, Call]
    clock: Clock
    rests: bool
    min_sample_us: float
    inner: dict[str, int] = field(default_factory=dict)
    call_us: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    stretch: int = 0

    def warm_up(self) -> None:
        """Run every target a few times, and find out how many calls make a sample."""
        for name, call in self.targets.items():
            durations = [self.clock.elapsed_ns(call, 1) / 1e3 for _ in range(3)]
            self.rest(0.0, sum(durations) / 1e6)
            self.call_us[name] = max(min(durations), 0.1)
            self.inner[name] = math.ceil(self.min_sample_us / self.call_us[name])
            self.samples[name] = []

    def burst(self, name: str) -> None:
        """Take one sample of a target."""
        call, inner, now = self.targets[name], self.inner[name], self.clock.now_ns
        began = now()
        # What ran before (a sleep, another target) must not be charged to the first calls.
        for _ in range(2 if self.call_us[name] < SHORT_CALL_US else 1):
            call()
        delay = self.clock.run_delay_ns()
        elapsed_ns = self.clock.elapsed_ns(call, inner)
        share = (self.clock.run_delay_ns() - delay) / elapsed_ns
        call_us = elapsed_ns / 1e3 / inner
        self.samples[name].append(Sample(self.stretch, call_us, share))
        self.rest(share, (now() - began) / 1e9)

    def rest(self, share: float, elapsed_s: float) -> None:
        """Sleep as long as we ran at real-time priority; else only when others want to run.

        A thread that has slept is scheduled at once and then runs undisturbed for a while.
        """
        if self.rests:
            self.clock.sleep(elapsed_s)
        elif share > MAX_DELAY_SHARE:
            self.clock.sleep(min(elapsed_s, REST_AFTER_DISTURBANCE_S))


SENTINEL = "sentinel"


def time_interleaved(
    targets: Mapping[str, Call],
    *,
    rounds: int,
    rng: random.Random,
    sentinel: Sentinel,
    min_sample_ms: float = 1.0,
    time_budget_s: float | None = None,
    target_error: float = 0.0,
    realtime: bool = False,
    clock: Clock,
) -> dict[str, Timing]:
    """Time every target against the sentinel.

    Args:
        targets: what to call, by name.
        rounds: rounds at most; targets of which too few samples were undisturbed get up to as
            many again.
        rng: orders the targets within each round.
        sentinel: timed several times in each round.
        min_sample_ms: calls are repeated until a sample is this long, so that it is longer than
            what the clock can resolve and shorter than a scheduler slice.
        time_budget_s: no more rounds are begun after it, but at least `MIN_ROUNDS`.
        target_error: stop when the mean relative standard error of the medians is below it.
        realtime: use `realtime_scheduling`, sleeping as long as it runs.
        clock: of the targets' backend.

    Raises:
        TooBusyError: when nothing at all is left of a target's samples.
        UserError: when real-time scheduling is not allowed.
    """
    if not targets:
        return {}
    calls = {**targets, SENTINEL: sentinel.call}
    session = _Session(calls, clock, realtime, min_sample_ms * 1e3)
    with torch.inference_mode(), no_garbage_collection():
        sentinel.call()
        _refresh(clock)
        with realtime_scheduling(realtime):
            start_ns = clock.now_ns()
            session.warm_up()
            deadline_ns = math.inf if time_budget_s is None else start_ns + time_budget_s * 1e9
            _run_rounds(session, rounds, rng, deadline_ns, target_error)
    return {
        name: summarise(session.samples[name], session.samples[SENTINEL], sentinel.reference_us)
        for name in targets
    }


def _refresh(clock: Clock) -> None:
    """Worker threads exist only after the first parallel operator."""
    refresh = getattr(clock, "refresh_threads", None)
    if refresh is not None:
        refresh()


def _run_rounds(
    session: _Session,
    rounds: int,
    rng: random.Random,
    deadline_ns: float,
    target_error: float,
) -> None:
    names = [name for name in session.targets if name != SENTINEL]
    done = 0
    while done < rounds:
        out_of_time = session.clock.now_ns() > deadline_ns
        if done >= MIN_ROUNDS and (out_of_time or _mean_error(session, names) < target_error):
            break
        _one_round(session, names, rng)
        done += 1
    for _ in range(rounds):
        sentinels = session.samples[SENTINEL]
        lacking = [name for name in names if not enough(session.samples[name], sentinels)]
        if not lacking or session.clock.now_ns() > deadline_ns:
            break
        _one_round(session, lacking, rng)


def _mean_error(session: _Session, names: Sequence[str]) -> float:
    sentinels = session.samples[SENTINEL]
    return statistics.fmean(relative_error(session.samples[name], sentinels) for name in names)


def _one_round(session: _Session, names: list[str], rng: random.Random) -> None:
    """Sample every name once, in a new order, in stretches that each have their own sentinels."""
    sentinel_us = session.call_us[SENTINEL] * session.inner[SENTINEL]
    limit_us = max(STRETCH_US, SENTINELS * sentinel_us / SENTINEL_SHARE)
    stretch: list[str] = []
    stretch_us = 0.0
    for name in rng.sample(names, len(names)):
        stretch.append(name)
        stretch_us += session.call_us[name] * session.inner[name]
        if stretch_us > limit_us:
            _one_stretch(session, stretch)
            stretch, stretch_us = [], 0.0
    if stretch:
        _one_stretch(session, stretch)


def _one_stretch(session: _Session, names: Sequence[str]) -> None:
    """Sample names, with sentinels before, between and after them."""
    places = {0, len(names) // 2}
    for position, name in enumerate(names):
        if position in places:
            session.burst(SENTINEL)
        session.burst(name)
    session.burst(SENTINEL)
    session.stretch += 1
