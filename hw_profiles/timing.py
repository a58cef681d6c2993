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
from typing import Literal

import torch

from hw_profiles.clock import Clock, no_garbage_collection, realtime_scheduling, system_clock
from searchspace.errors import UserError

Call = Callable[[], object]
Context = Literal["steady", "mixed"]

MAX_DELAY_SHARE = 0.005
"""Share of a sample that threads may have waited for a processor."""
MIN_ROUNDS = 5
MIN_KEPT_ROUNDS = 3
MIN_KEPT_FRACTION = 0.3
SENTINEL_SHARE = 0.2
"""Share of a round's time that goes to the sentinel."""
MIN_SENTINELS = 2
MAX_PASSES = 32
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
    context: Context
    rests: bool
    min_sample_us: float
    inner: dict[str, int] = field(default_factory=dict)
    call_us: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    rested: bool = False

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
            wanted = math.ceil(self.min_sample_us / self.call_us[name])
            self.inner[name] = 1 if self.context == "mixed" else wanted
            self.samples[name] = []

    def burst(self, names: Sequence[str], round_index: int) -> None:
        """Time calls that follow one another; they are kept or dropped together."""
        # What ran before (a sleep, a bigger target) must not be charged to the first call.
        if self.context == "steady" or names == [SENTINEL]:
            self.targets[names[0]]()
        elif self.rested:
            self.targets[names[-1]]()
        now, started, timed = self.clock.now_ns, self.clock.now_ns(), []
        delay = self.clock.run_delay_ns()
        for name in names:
            call, inner = self.targets[name], self.inner[name]
            start = now()
            for _ in range(inner):
                call()
            timed.append((name, (now() - start) / inner))
        delay = self.clock.run_delay_ns() - delay
        total = sum(duration * self.inner[name] for name, duration in timed)
        share = delay / max(total, 1.0)
        for name, duration in timed:
            self.samples[name].append(Sample(round_index, duration / 1e3, share))
        self.rest(share, (now() - started) / 1e9)

    def rest(self, share: float, elapsed_s: float) -> None:
        """Sleep as long as we ran at real-time priority; else only when others want to run.

        A thread that has slept is scheduled at once and then runs undisturbed for a while.
        """
        self.rested = self.rests or share > MAX_DELAY_SHARE
        if self.rested:
            self.clock.sleep(elapsed_s if self.rests else min(elapsed_s, REST_AFTER_DISTURBANCE_S))


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
    context: Context = "steady",
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
        context: ``"steady"`` repeats a target until its weights are in cache, as a network that
            runs again and again has them; ``"mixed"`` times single calls between other targets,
            as a part of a network runs between other parts.
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
                context=context,
                realtime=realtime,
                clock=clock,
            )
    calls = {**targets, SENTINEL: sentinel.call}
    session = _Session(calls, clock, context, realtime, min_sample_ms * 1e3)
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
    """Sample every name, and the sentinel in between."""
    sample_us = {name: session.call_us[name] * session.inner[name] for name in session.targets}
    total_us = sum(sample_us[name] for name in names)
    least_us = MIN_SENTINELS * sample_us[SENTINEL] / SENTINEL_SHARE
    passes = 1
    if session.context == "mixed":
        passes = min(max(1, math.ceil(least_us / total_us)), MAX_PASSES)
    order = [name for _ in range(passes) for name in rng.sample(names, len(names))]
    num_sentinels = max(
        MIN_SENTINELS, round(SENTINEL_SHARE * passes * total_us / sample_us[SENTINEL])
    )
    for part in _split(order, num_sentinels):
        session.burst([SENTINEL], index)
        for burst in _bursts(part, sample_us, session):
            session.burst(burst, index)
    session.burst([SENTINEL], index)


def _split(order: list[str], parts: int) -> list[list[str]]:
    size = math.ceil(len(order) / parts)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _bursts(order: list[str], sample_us: Mapping[str, float], session: _Session) -> list[list[str]]:
    """Join single calls into bursts of the wanted length; steady samples are one burst each."""
    if session.context == "steady":
        return [[name] for name in order]
    bursts: list[list[str]] = [[]]
    length_us = 0.0
    for name in order:
        if bursts[-1] and length_us + sample_us[name] > 2 * session.min_sample_us:
            bursts.append([])
            length_us = 0.0
        bursts[-1].append(name)
        length_us += sample_us[name]
    return bursts


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
        TooBusyError: when even the least disturbed samples were disturbed for most of their time.
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
        raise TooBusyError(
            f"the machine is too busy to time anything: none of {len(samples)} samples ran "
            "undisturbed; stop other programs and run the same command again"
        )
    ratio = statistics.median(ratios)
    return Timing(ratio, ratio * reference_us, _spread(ratios), len(ratios), kept, reliable)


def _spread(ratios: Sequence[float]) -> float:
    """Return the median absolute deviation over the median."""
    middle = statistics.median(ratios)
    return statistics.median(abs(value - middle) for value in ratios) / middle
