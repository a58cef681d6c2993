"""Samples and what they say: per-round ratios to the sentinel, their median, its uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from searchspace.errors import UserError

MAX_DELAY_SHARE = 0.005
"""Share of a sample that threads may have waited for a processor."""
MIN_KEPT_ROUNDS = 3
MIN_KEPT_FRACTION = 0.3
# The standard error of a median of n normal values, as a multiple of their median absolute
# deviation over sqrt(n).
STANDARD_ERROR = 1.2533 * 1.4826


class TooBusyError(UserError):
    """No sample of some target ran undisturbed."""


@dataclass(frozen=True)
class Sample:
    """One timed burst: in which stretch of time, how long a call took, and what share of it threads
    had to wait.
    """

    stretch: int
    call_us: float
    delay_share: float


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


def enough(samples: Sequence[Sample], sentinels: Sequence[Sample]) -> bool:
    """Return whether enough rounds were undisturbed."""
    ratios = round_ratios(samples, sentinels, MAX_DELAY_SHARE)
    rounds = len({sample.stretch for sample in samples})
    return len(ratios) >= max(MIN_KEPT_ROUNDS, MIN_KEPT_FRACTION * rounds)


def relative_error(samples: Sequence[Sample], sentinels: Sequence[Sample]) -> float:
    """Return the relative standard error of the median ratio; infinite with too few rounds."""
    ratios = round_ratios(samples, sentinels, MAX_DELAY_SHARE)
    if len(ratios) < MIN_KEPT_ROUNDS:
        return math.inf
    return STANDARD_ERROR * _spread(ratios) / math.sqrt(len(ratios))


def round_ratios(
    samples: Sequence[Sample], sentinels: Sequence[Sample], max_delay_share: float
) -> list[float]:
    """Return target / sentinel for each stretch in which both have an undisturbed sample."""
    times = _by_stretch(samples, max_delay_share)
    references = _by_stretch(sentinels, max_delay_share)
    return [
        statistics.median(times[index]) / statistics.median(references[index])
        for index in times
        if index in references
    ]


def _by_stretch(samples: Sequence[Sample], max_delay_share: float) -> dict[int, list[float]]:
    stretches: dict[int, list[float]] = {}
    for sample in samples:
        if sample.delay_share <= max_delay_share:
            stretches.setdefault(sample.stretch, []).append(sample.call_us)
    return stretches


def summarise(
    samples: Sequence[Sample], sentinels: Sequence[Sample], reference_us: float
) -> Timing:
    """Turn samples into a `Timing`; disturbed samples count only where too few others are left.

    Raises:
        TooBusyError: when no round has both a sample and a sentinel.
    """
    kept = sum(sample.delay_share <= MAX_DELAY_SHARE for sample in samples) / len(samples)
    rounds = len({sample.stretch for sample in samples})
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
