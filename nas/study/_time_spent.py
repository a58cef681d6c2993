"""How long the processes of a search were at work on its trials."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from optuna.trial import FrozenTrial

from nas.study.claims import LATE
from nas.study.generations import INTERRUPTED

Span = tuple[datetime, datetime]


def seconds_at_work(trials: Sequence[FrozenTrial]) -> float:
    """Return the seconds in which at least one process was at work on a finished trial."""
    total, end = 0.0, datetime.min
    for start, stop in sorted(span for trial in trials if (span := _span(trial)) is not None):
        if stop > end:
            total += (stop - max(start, end)).total_seconds()
            end = stop
    return total


def _span(trial: FrozenTrial) -> Span | None:
    """Return when a process was at work on a trial; None where that is not known.

    A trial whose process was killed is ended by the next one, maybe days later: only what it says
    of its evaluation counts.
    """
    start, stop = trial.datetime_start, trial.datetime_complete
    if start is None or stop is None:
        return None
    attrs = trial.user_attrs
    if LATE in attrs or str(attrs.get("reason", "")).startswith(INTERRUPTED):
        stop = min(stop, start + timedelta(seconds=float(attrs.get("seconds", 0.0))))
    return start, stop
