"""The timing protocol: short interleaved samples, each as a ratio to a sentinel timed beside it.

On a shared machine the clock drifts by up to two times within minutes and threads are taken off
their processors at any moment. So every round times every target once, in a new order, together
with a sentinel matrix product; a target's value is the median over rounds of its ratio to the
sentinel of the same round, and samples during which a thread waited for a processor are dropped.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hw_profiles.clock import Clock, no_garbage_collection, realtime_scheduling, system_clock
from searchspace.errors import UserError

Call = Callable[[], object]

MAX_DELAY_SHARE = 0.005
"""Share of a sample that threads may have waited for a processor."""
MIN_ROUNDS = 5
MIN_KEPT_ROUNDS = 3
MIN_KEPT_FRACTION = 0.3
SENTINEL_SHARE = 0.2
"""Share of a round's time that goes to the sentinel."""
MIN_SENTINELS = 2
SHORT_CALL_US = 500.0
"""Calls shorter than this are run twice, others once, before a sample."""
REST_AFTER_DISTURBANCE_S = 0.002
# Standard error of a median of n normal values is this times their median absolute deviation / sqrt(n).
STANDARD_ERROR = 1.2533 * 1.4826
REFERENCE_SAMPLES = 100


class TooBusyError(UserError):
    """No sample of some target ran undisturbed."""


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
    def gemm(cls, reference_us: float, size: int = 512) -> Sentinel:
        """Return a square fp32 matrix product with a known reference time."""
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(size, size, generator=generator)
        right = torch.randn(size, size, generator=generator)
        out = torch.empty(size, size)
        return cls(lambda: torch.mm(left, right, out=out), reference_us)

    @classmethod
    def measured(cls, clock: Clock | None = None, realtime: bool = False) -> Sentinel:
        """Return the matrix product with its reference timed now.

        The reference is the time it takes when nothing disturbs it: a low quantile of the
        undisturbed samples, which repeats far better than their median.
        """
        sentinel = cls.gemm(math.nan)
        if clock is None:
            with system_clock() as clock:
                return cls.measured(clock, realtime)
        for _ in range(3):
            sentinel.call()
        _refresh(clock)
        with realtime_scheduling(realtime), no_garbage_collection():
            samples = [sentinel._sample(clock) for _ in range(REFERENCE_SAMPLES)]
        undisturbed = [us for us, share in samples if share <= MAX_DELAY_SHARE]
        durations = undisturbed if len(undisturbed) >= 10 else [us for us, _ in samples]
        return cls(sentinel.call, statistics.quantiles(durations, n=10)[0])

    def _sample(self, clock: Clock) -> tuple[float, float]:
        """Return the time of one call in microseconds, and the share of it threads had to wait."""
        clock.sleep(REST_AFTER_DISTURBANCE_S)
        self.call()
        delay, start = clock.run_delay_ns(), clock.now_ns()
        self.call()
        elapsed_ns = max(clock.now_ns() - start, 1)
        return elapsed_ns / 1e3, (clock.run_delay_ns() - delay) / elapsed_ns


@dataclass(frozen=True)
class Timing:
    """One target's latency.

    Args:
        ratio: median over rounds of target time / sentinel time.
        latency_us: `ratio` times the sentinel's reference, for one call.
        spread: median absolute deviation of the per-round ratios / their median.
        num_samples: rounds that count.
        kept_fraction: undisturbed samples / samples taken.
        reliable: False when too few samples were undisturbed and the least disturbed were used.
    """

    ratio: float
    latency_us: float
    spread: float
    num_samples: int
    kept_fraction: float
    reliable: bool = True


@dataclass(frozen=True)
class Sample:
    """One timed burst: when, how long a call took, and what share of it threads had to wait."""

    round: int
    call_us: float
    delay_share: float


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

    def warm_up(self) -> None:
        """Run every target a few times, and find out how many calls make a sample."""
        for name, call in self.targets.items():
            durations = []
            for _ in range(3):
                start = self.clock.now_ns()
                call()
                durations.append((self.clock.now_ns() - start) / 1e3)
            self.rest(0.0, sum(durations) / 1e6)
            self.call_us[name] = max(min(durations), 0.1)
            self.inner[name] = math.ceil(self.min_sample_us / self.call_us[name])
            self.samples[name] = []

    def burst(self, name: str, round_index: int) -> None:
        """Take one sample of a target."""
        call, inner, now = self.targets[name], range(self.inner[name]), self.clock.now_ns
        began = now()
        # What ran before (a sleep, another target) must not be charged to the first calls.
        for _ in range(2 if self.call_us[name] < SHORT_CALL_US else 1):
            call()
        delay, start = self.clock.run_delay_ns(), now()
        for _ in inner:
            call()
        elapsed_ns = max(now() - start, 1)
        share = (self.clock.run_delay_ns() - delay) / elapsed_ns
        call_us = elapsed_ns / 1e3 / self.inner[name]
        self.samples[name].append(Sample(round_index, call_us, share))
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
    clock: Clock | None = None,
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
        clock: for tests.

    Raises:
        TooBusyError: when nothing at all is left of a target's samples.
        UserError: when real-time scheduling is not allowed.
    """
    if not targets:
        return {}
    if clock is None:
        with system_clock() as clock:
            return time_interleaved(
                targets,
                rounds=rounds,
                rng=rng,
                sentinel=sentinel,
                min_sample_ms=min_sample_ms,
                time_budget_s=time_budget_s,
                target_error=target_error,
                realtime=realtime,
                clock=clock,
            )
    calls = {**targets, SENTINEL: sentinel.call}
    session = _Session(calls, clock, realtime, min_sample_ms * 1e3)
    with torch.inference_mode(), no_garbage_collection():
        sentinel.call()
        _refresh(clock)
        with realtime_scheduling(realtime):
            session.warm_up()
            _run_rounds(session, rounds, rng, time_budget_s, target_error)
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
    time_budget_s: float | None,
    target_error: float,
) -> None:
    start = session.clock.now_ns()
    names = [name for name in session.targets if name != SENTINEL]

    def out_of_time() -> bool:
        spent_s = (session.clock.now_ns() - start) / 1e9
        return time_budget_s is not None and spent_s > time_budget_s

    done = 0
    while done < rounds:
        if done >= MIN_ROUNDS and (out_of_time() or _mean_error(session, names) < target_error):
            break
        _one_round(session, names, done, rng)
        done += 1
    for extra in range(done, done + rounds):
        lacking = [name for name in names if not _enough(session, name)]
        if not lacking or out_of_time():
            break
        _one_round(session, lacking, extra, rng)


def _mean_error(session: _Session, names: Sequence[str]) -> float:
    """Return the mean over targets of the relative standard error of the median ratio."""
    errors = []
    for name in names:
        ratios = round_ratios(session.samples[name], session.samples[SENTINEL], MAX_DELAY_SHARE)
        if len(ratios) < MIN_KEPT_ROUNDS:
            return math.inf
        errors.append(STANDARD_ERROR * _spread(ratios) / math.sqrt(len(ratios)))
    return statistics.fmean(errors)


def _one_round(session: _Session, names: list[str], index: int, rng: random.Random) -> None:
    """Sample every name once, in a new order, and the sentinel in between."""
    total_us = sum(session.call_us[name] * session.inner[name] for name in names)
    sentinel_us = session.call_us[SENTINEL] * session.inner[SENTINEL]
    num_sentinels = max(MIN_SENTINELS, round(SENTINEL_SHARE * total_us / sentinel_us))
    every = math.ceil(len(names) / num_sentinels)
    for position, name in enumerate(rng.sample(names, len(names))):
        if position % every == 0:
            session.burst(SENTINEL, index)
        session.burst(name, index)
    session.burst(SENTINEL, index)


def _enough(session: _Session, name: str) -> bool:
    ratios = round_ratios(session.samples[name], session.samples[SENTINEL], MAX_DELAY_SHARE)
    rounds = len({sample.round for sample in session.samples[name]})
    return len(ratios) >= max(MIN_KEPT_ROUNDS, MIN_KEPT_FRACTION * rounds)


def round_ratios(
    samples: Sequence[Sample], sentinels: Sequence[Sample], max_delay_share: float
) -> list[float]:
    """Return target / sentinel for each round in which both have an undisturbed sample."""
    times = _by_round(samples, max_delay_share)
    references = _by_round(sentinels, max_delay_share)
    return [
        statistics.median(times[index]) / statistics.median(references[index])
        for index in times
        if index in references
    ]


def _by_round(samples: Sequence[Sample], max_delay_share: float) -> dict[int, list[float]]:
    rounds: dict[int, list[float]] = {}
    for sample in samples:
        if sample.delay_share <= max_delay_share:
            rounds.setdefault(sample.round, []).append(sample.call_us)
    return rounds


def summarise(
    samples: Sequence[Sample], sentinels: Sequence[Sample], reference_us: float
) -> Timing:
    """Turn samples into a `Timing`; disturbed samples count only where too few others are left.

    Raises:
        TooBusyError: when no round has both a sample and a sentinel.
    """
    kept = sum(sample.delay_share <= MAX_DELAY_SHARE for sample in samples) / len(samples)
    rounds = len({sample.round for sample in samples})
    ratios = round_ratios(samples, sentinels, MAX_DELAY_SHARE)
    wanted = min(rounds, max(MIN_KEPT_ROUNDS, MIN_KEPT_FRACTION * rounds))
    reliable = len(ratios) >= wanted
    limit = 4 * MAX_DELAY_SHARE
    while len(ratios) < min(MIN_KEPT_ROUNDS, rounds) and limit < 1.0:
        ratios = round_ratios(samples, sentinels, limit)
        limit *= 2
    if not ratios:
        # A median over rounds of ratios taken side by side still says something; it is marked.
        ratios = round_ratios(samples, sentinels, math.inf)
    if not ratios:
        raise TooBusyError(
            "the machine is too busy to time anything: no round of samples was finished; stop "
            "other programs and run the same command again"
        )
    ratio = statistics.median(ratios)
    return Timing(ratio, ratio * reference_us, _spread(ratios), len(ratios), kept, reliable)


def _spread(ratios: Sequence[float]) -> float:
    """Return the median absolute deviation over the median."""
    middle = statistics.median(ratios)
    return statistics.median(abs(value - middle) for value in ratios) / middle
